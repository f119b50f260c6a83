"""The verdict, and reasons that a person can act on.

A direction passes where its effect is none that a direction of no meaning has. A random one that is put in its place
is the best of the sweep's cells, so ranking first among 20 others (p = 1/21) is not enough: it must also be beyond
what they do to the pairs or to the answers, and beyond those from shuffled labels, and change the answers themselves, and more
so than random directions do. benchmarks/calibration.py measures how often that happens by chance.
"""

from __future__ import annotations

from compile_steer.stats import LEVEL
from compile_steer.steering.directions import FROM_LABELS
from compile_steer.validate.options import Validate
from compile_steer.validate.report import Controls, ValidationReport, Verdict

# Small, because the candidate was chosen from a whole sweep.
_BEYOND_RANDOM = 0.002
_BEYOND_SHUFFLED = 0.02
_SEPARATES = 0.8


def judge(report: ValidationReport, options: Validate) -> tuple[Verdict, list[str]]:
    """The verdict and every reason for it; a reason against it comes before those for it."""
    failures = _failures(report) + _incoherent(report, options)
    doubts = _doubts(report)
    if failures:
        return "fail", failures + doubts
    if doubts:
        return "inconclusive", doubts
    return "pass", _evidence(report)


def _evidence(report: ValidationReport) -> list[str]:
    c, s = report.controls, report.scores
    others = [
        f"{len(c.random)} random directions of the same dose move it by at most {max(c.random):.3f} (p = {c.p_value:.3f})"
    ]
    if c.shuffled:
        others.append(f"{len(c.shuffled)} {c.shuffled_kind} by at most {max(c.shuffled):.3f}")
    if c.other_behaviour is not None:
        others.append(f"another behaviour's by {c.other_behaviour:.3f}")
    others.append(f"the opposite sign by {c.opposite:.3f}")
    return [
        f"on {report.n_pairs} test pairs steering moves log p(positive) - log p(negative) by {report.margin} nats a token "
        f"(sign-flip p = {report.p_margin:.4f})",
        ", ".join(others),
        f"on {report.n_prompts} test prompts the score goes from {s.base:.2f} to {s.steered:.2f} (change {s.effect}, p = "
        f"{s.p_value:.4f}); random directions score {s.random:.2f}",
        f"neutral perplexity x{report.coherence.perplexity_ratio:.2f}, repetition {report.coherence.repetition_steered:.2f}",
    ]


def _not_carried(controls: Controls) -> str:
    if controls.shuffled_kind == FROM_LABELS:
        return "the pairs do not carry the behaviour; make their sides differ in it alone, or add pairs"
    return "the file's vector does nothing of its own to these pairs; try other layers, another row or another file"


def _failures(report: ValidationReport) -> list[str]:
    c, s = report.controls, report.scores
    found = []
    if report.margin.high <= 0:  # what the controls do better needs no saying then
        return [
            f"the direction moves the pairs the wrong way: {report.margin} nats a token; negate the coefficients, or "
            "look whether the pairs' sides are swapped"
        ]
    if c.p_value > LEVEL:
        a = report.separability.auroc
        but = f"the direction separates the pairs (AUROC {a:.2f}), but " if a >= _SEPARATES else ""
        found.append(
            f"{but}a random direction of the same dose moves the score as much: effect {c.effect:.3f}, random up to "
            f"{max(c.random):.3f} (p = {c.p_value:.3f}); try other layers (validate.layers: search), more pairs, or another "
            "read-out"
        )
    if c.shuffled and c.effect <= max(c.shuffled):
        found.append(
            f"directions {c.shuffled_kind} do as well ({max(c.shuffled):.3f} against {c.effect:.3f}): {_not_carried(c)}"
        )
    if c.other_behaviour is not None and c.effect <= c.other_behaviour:
        found.append(
            f"another behaviour's direction moves these pairs as much ({c.other_behaviour:.3f} against {c.effect:.3f}): what "
            "moves them is not this behaviour; look what the two sets of pairs have in common (length, style)"
        )
    if s.effect.value > 0 and s.over_random.value <= 0:
        found.append(
            f"random directions of the same dose score as well: {s.random:.2f}, steered {s.steered:.2f}, base {s.base:.2f}; "
            "the scorer is answering to the damage: make it stricter, or use a smaller coefficient"
        )
    return found


def _incoherent(report: ValidationReport, options: Validate) -> list[str]:
    h, found = report.coherence, []
    if h.perplexity_ratio > options.max_perplexity_ratio:
        found.append(
            f"neutral text becomes {h.perplexity_ratio:.2f}x as perplexing (at most {options.max_perplexity_ratio:g}): use a "
            "smaller coefficient" + _up_to_wall(report)
        )
    if h.repetition_steered > max(options.max_repetition, h.repetition_base):
        found.append(
            f"the steered model repeats itself: {h.repetition_steered:.2f} of its 3-grams (base {h.repetition_base:.2f}, at "
            f"most {options.max_repetition:g}); use a smaller coefficient"
        )
    if report.scores.steered < options.min_score:
        found.append(
            f"the score on test prompts is {report.scores.steered:.2f}, below {options.min_score:g}; use a larger "
            "coefficient" + _up_to_wall(report)
        )
    return found


def _up_to_wall(report: ValidationReport) -> str:
    wall = report.coefficient_sweep.crossing if report.coefficient > 0 else report.coefficient_sweep.negative_crossing
    return "" if wall is None else f" (the ceiling is crossed at {wall:.3g})"


def _by_chance(report: ValidationReport) -> float:
    """How likely a random direction does as much to the pairs or to the answers: Bonferroni over the two.

    Either is enough. Past the first order random directions spread far, most of all those that do damage: one of 20
    that moves the pairs by -1.1 nats a token hides +0.9 from a test of outliers while no answer under any of them shows
    the behaviour.
    """
    return min(1.0, 2 * min(report.controls.p_random, report.scores.p_over_random))


def _doubts(report: ValidationReport) -> list[str]:
    c, s = report.controls, report.scores
    found = []
    if report.margin.high > 0 and report.p_margin > LEVEL:
        found.append(
            f"the effect may be chance on {report.n_pairs} pairs: {report.margin} nats a token (sign-flip p = "
            f"{report.p_margin:.3f}); add test pairs"
        )
    if c.p_value <= LEVEL and _by_chance(report) > _BEYOND_RANDOM:
        found.append(
            f"the effect is first among {len(c.random)} random directions ({c.effect:.3f}, up to {max(c.random):.3f}), but not "
            f"clear of them: one in {1 / c.p_random:.0f} would do as much to the pairs, the answers differ from theirs with p = "
            f"{s.p_over_random:.3f}, and the sweep chose among several; try other layers (validate.layers: search), more "
            "pairs or more prompts"
        )
    if c.p_shuffled is not None and c.effect > max(c.shuffled) and c.p_shuffled > _BEYOND_SHUFFLED:
        found.append(
            f"the effect is not clear of {len(c.shuffled)} directions {c.shuffled_kind} ({c.effect:.3f}, up to "
            f"{max(c.shuffled):.3f}, p = {c.p_shuffled:.3f}); add pairs, or more of these directions (extract.shuffled: 20)"
        )
    if c.opposite >= 0 and report.margin.high > 0:
        found.append(f"the opposite sign moves the pairs the same way ({c.opposite:.3f}): not one direction")
    if s.p_value > LEVEL:
        more = "nothing is left to gain: make the scorer stricter" if s.base > 0.9 else "add prompts or coefficient"
        found.append(
            f"the answers themselves do not change for certain: score {s.base:.2f} to {s.steered:.2f} ({s.effect}, p = "
            f"{s.p_value:.3f}) on {report.n_prompts} prompts; {more}{_up_to_wall(report) if s.base <= 0.9 else ''}"
        )
    elif s.over_random.value > 0 and s.p_over_random > LEVEL:
        found.append(
            f"the answers are not clear of those under random directions of the same dose: {s.steered:.2f} against "
            f"{s.random:.2f} (difference {s.over_random}, p = {s.p_over_random:.3f}); add prompts"
        )
    return found


def remarks(report: ValidationReport) -> list[str]:
    """What the verdict does not hang on: is steering better than asking, what was not controlled, and the corrections."""
    s = report.scores
    found = []
    for what, mean, over in (
        ("asking for it in the prompt", s.instructed, s.over_instructed),
        ("showing examples before the prompt", s.few_shot, s.over_few_shot),
    ):
        if mean is None or over is None:
            continue
        told = f"{what} scores {mean:.2f}, steering {s.steered:.2f} (difference {over})"
        if over.high < 0:
            found.append(f"{told}: {what.split()[0]} is better where the prompt is free")
        elif over.low > 0:
            found.append(f"{told}: steering is better")
        else:
            found.append(f"{told}: no difference is certain")
    if not report.controls.shuffled:
        found.append("no directions from shuffled labels: the extraction made none, so that control is missing")
    tested = [cell.q_value for cell in report.grid if cell.q_value is not None]
    passed = sum(q <= LEVEL for q in tested)
    found.append(
        f"{passed} of {len(tested)} cells of the sweep move the validation pairs at a false discovery rate of {LEVEL:.0%}; the "
        "test split was measured once, for the chosen cell alone, so its p-values need no correction"
    )
    return found
