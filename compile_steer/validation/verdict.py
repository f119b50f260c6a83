"""The verdict, and the reasons for it.

A direction passes if no direction without meaning has the same effect. The candidate is the best of a whole sweep, so
that ranking first among 20 random directions (p = 1/21) is not enough: the effect must also be an outlier among what they
do to the pairs or to the answers, and among directions from shuffled labels; it must change the answers themselves, and
more than random directions do. benchmarks/calibration.py measures how often this happens by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from compile_steer.common.figures import decisive, probability
from compile_steer.stats import LEVEL, Interval
from compile_steer.steering.directions import EVERY_BLOCK, FROM_LABELS
from compile_steer.validation.choice import cheaper_advice
from compile_steer.validation.options import ValidateOptions, repetition_limit
from compile_steer.validation.report import SweepPoint, ValidationReport, Verdict

# Below the usual 5 %, because the candidate was chosen from a whole sweep.
_BEYOND_RANDOM = 0.002
_BEYOND_SHUFFLED = 0.02
_POWER_WIDTH = (1.96 + 0.84) / 1.96  # half the width of a 95 % interval at which a test has 80 % power
_SEPARATES = 0.8  # AUROC from which the direction is said to separate the pairs


class _Reason(NamedTuple):
    """Something against a pass, and what to do about it; `move` is how that changes the coefficient, if it does."""

    text: str
    advice: str
    move: Literal["", "smaller", "larger"] = ""


def decide(report: ValidationReport, options: ValidateOptions) -> tuple[Verdict, list[str]]:
    """Return the verdict and all reasons for it; failures come first, and one line of advice last."""
    failures = [*_failures(report, options), *_price(report), *_incoherence(report, options)]
    doubts = list(_doubts(report, options))
    if not failures and not doubts:
        return "pass", _evidence(report)
    against = failures + doubts
    return "fail" if failures else "inconclusive", [
        *(r.text for r in against),
        f"advice: {_advice(against, report, options)}",
    ]


def _advice(against: list[_Reason], report: ValidationReport, options: ValidateOptions) -> str:
    """What to do about the first reason, unless another one asks for the opposite."""
    first = against[0]
    if first.move and {"smaller", "larger"} <= {reason.move for reason in against}:
        return (
            f"no coefficient of this block does both, {report.coefficient:.3g} is too large and too small: "
            f"{_other_layers(report, options)}"
        )
    return first.advice


def _other_layers(report: ValidationReport, options: ValidateOptions) -> str:
    tried = len({point.layer for point in report.grid})
    if options.layers == "search" or report.layer == EVERY_BLOCK:
        return f"use more training pairs, or another read-out (extract.readout); the sweep ended with {tried} block(s)"
    return f"search all blocks (validate.layers: search), the sweep tried {tried}"


def _within_limits(report: ValidationReport, options: ValidateOptions) -> list[SweepPoint]:
    """The coherent points of the coefficient sweep with the sign of the chosen coefficient, the smallest first."""
    sign = 1 if report.coefficient > 0 else -1
    points = [
        point
        for point in report.coefficient_sweep.points
        if point.coefficient * sign > 0
        and point.perplexity_ratio <= options.max_perplexity_ratio
        and point.repetition <= repetition_limit(options, report.coherence.repetition_base)
    ]
    return sorted(points, key=lambda point: abs(point.coefficient))


def _smaller(report: ValidationReport, options: ValidateOptions) -> str:
    below = [p for p in _within_limits(report, options) if abs(p.coefficient) < abs(report.coefficient)]
    if not below:
        return f"use a coefficient far below {report.coefficient:.3g}, none of the coefficient sweep is coherent"
    best = below[-1]
    return (
        f"use coefficient {best.coefficient:.3g}, where the perplexity of control text is x{best.perplexity_ratio:.2f} and "
        f"the score {best.score:.2f}"
    )


def _larger(report: ValidationReport, options: ValidateOptions) -> str:
    needed = max(options.min_score, report.scores.steered)
    above = [p for p in _within_limits(report, options) if abs(p.coefficient) > abs(report.coefficient)]
    better = [point for point in above if point.score >= needed and point.score > report.scores.base]
    if not better:
        return f"no larger coefficient is coherent and scores more than {needed:.2f}: {_other_layers(report, options)}"
    return f"use coefficient {better[0].coefficient:.3g}, where the score is {better[0].score:.2f}"


def _more(samples: str, effect: Interval, n: int, otherwise: str) -> str:
    """Say how many samples would show an effect of this size, by the width of its interval; `otherwise` if it is far too small."""
    wide = (effect.high - effect.low) / 2
    if wide * _POWER_WIDTH >= 10 * effect.value:
        return otherwise
    needed = max(math.ceil(n * (wide / effect.value * _POWER_WIDTH) ** 2), n + 1)
    return f"add test {samples}: {needed:,} would show an effect of this size, there are {n}"


def _evidence(report: ValidationReport) -> list[str]:
    c, s = report.controls, report.scores
    # Controls in the order of what they exclude: any direction, the extraction's noise, another behaviour, the damage.
    others = [
        f"{len(c.random)} random directions of the same strength change it by at most {max(c.random):.3f} ({probability(c.p_value)})"
    ]
    if c.shuffled:
        others.append(f"{len(c.shuffled)} {c.shuffled_kind} by at most {max(c.shuffled):.3f}")
    if c.other_behaviour is not None:
        others.append(f"another behaviour's by {c.other_behaviour:.3f}")
    others.append(f"the opposite sign by {c.opposite:.3f}")
    return [
        f"on {report.n_pairs} test pairs steering changes the log-likelihood margin by {report.margin} nats/token (sign-flip "
        f"p = {report.p_margin:.4f})",
        ", ".join(others),
        f"on {report.n_prompts} test prompts the score goes from {s.base:.2f} to {s.steered:.2f} (change {s.effect}, p = "
        f"{s.p_value:.4f}); random directions score {s.random:.2f}",
        f"perplexity of control text x{report.coherence.perplexity_ratio:.2f}{_over_texts(report)}, repetition "
        f"{report.coherence.repetition_steered:.2f}",
    ]


def _over_texts(report: ValidationReport) -> str:
    logs = report.coherence.log_perplexity
    return "" if logs is None else f" [{math.exp(logs.low):.2f}, {math.exp(logs.high):.2f}]"


def _failures(report: ValidationReport, options: ValidateOptions) -> Iterator[_Reason]:
    c, s = report.controls, report.scores
    if report.margin.high <= 0:  # no control is needed then
        yield _Reason(
            f"the direction moves the pairs the wrong way: {report.margin} nats/token",
            f"negate the coefficients (here {-report.coefficient:.3g}), or check whether the pairs' sides are swapped",
        )
        return
    if c.p_value > LEVEL:
        area = report.separability.auroc
        but = f"the direction separates the pairs (AUROC {area:.2f}), but " if area >= _SEPARATES else ""
        yield _Reason(
            f"{but}a random direction of the same strength changes the margin as much: effect {c.effect:.3f}, random up to "
            f"{max(c.random):.3f} ({probability(c.p_value)})",
            _other_layers(report, options),
        )
    if c.shuffled and c.effect <= max(c.shuffled):
        finding, advice = (
            (
                "the pairs do not carry the behaviour",
                "make the sides of the pairs differ in the behaviour alone, or add pairs",
            )
            if c.shuffled_kind == FROM_LABELS
            else ("the file's vector has no effect of its own on these pairs", "try another row or another file")
        )
        size = f"({max(c.shuffled):.3f}, this one {c.effect:.3f})"
        yield _Reason(f"directions {c.shuffled_kind} have as large an effect {size}: {finding}", advice)
    if c.other_behaviour is not None and c.effect <= c.other_behaviour:
        yield _Reason(
            f"another behaviour's direction moves these pairs as much ({c.other_behaviour:.3f}, this one {c.effect:.3f}): the "
            "effect is not specific to this behaviour",
            "check what the two sets of pairs have in common (length, style)",
        )
    if s.effect.value > 0 and s.over_random.value <= 0:
        yield _Reason(
            f"random directions of the same strength score as well: {s.random:.2f}, steered {s.steered:.2f}, base "
            f"{s.base:.2f}; the scorer responds to the damage",
            "make the scorer stricter",
        )


def _price(report: ValidationReport) -> Iterator[_Reason]:
    for effect in report.side_effects:
        if effect.violated:
            key = f"validate.tolerances.{effect.key}"
            text = f"steering costs more than {key} allows: {effect}"
            yield _Reason(text, cheaper_advice(report), "smaller")


def _incoherence(report: ValidationReport, options: ValidateOptions) -> Iterator[_Reason]:
    coherence = report.coherence
    if coherence.perplexity_ratio > options.max_perplexity_ratio:
        ratio = decisive(coherence.perplexity_ratio, options.max_perplexity_ratio, ".2f")[0]
        yield _Reason(
            f"the perplexity of control text rises {ratio}-fold (at most {options.max_perplexity_ratio:g})"
            + _crossing(report),
            _smaller(report, options),
            "smaller",
        )
    limit = repetition_limit(options, coherence.repetition_base)
    if coherence.repetition_steered > limit:
        shown, base = (decisive(x, limit, ".2f")[0] for x in (coherence.repetition_steered, coherence.repetition_base))
        yield _Reason(
            f"the steered model repeats itself: {shown} of its 3-grams (base {base}, at most {limit:.3g})",
            _smaller(report, options),
            "smaller",
        )
    if report.scores.steered < options.min_score:
        score = decisive(report.scores.steered, options.min_score, ".2f")[0]
        yield _Reason(
            f"the score on test prompts is {score}, below {options.min_score:g}" + _crossing(report),
            _larger(report, options),
            "larger",
        )


def _crossing(report: ValidationReport) -> str:
    sweep = report.coefficient_sweep
    crossing = sweep.crossing if report.coefficient > 0 else sweep.negative_crossing
    return "" if crossing is None else f" (the perplexity limit is crossed at {crossing:.3g})"


def _doubts(report: ValidationReport, options: ValidateOptions) -> Iterator[_Reason]:
    c, s = report.controls, report.scores
    # Bonferroni over pairs and answers: either is enough. Beyond first order random directions spread far, most of all
    # those that do damage: one of 20 that moves the pairs by -1.1 nats/token hides +0.9 from a test of outliers while no
    # answer under any of them shows the behaviour.
    by_chance = min(1.0, 2 * min(c.p_random, s.p_over_random))
    if report.margin.high > 0 and report.p_margin > LEVEL:
        yield _Reason(
            f"the effect may be chance on {report.n_pairs} pairs: {report.margin} nats/token (sign-flip p = "
            f"{report.p_margin:.3f})",
            _more("pairs", report.margin, report.n_pairs, _larger(report, options)),
        )
    if c.p_value <= LEVEL and by_chance > _BEYOND_RANDOM:
        yield _Reason(
            f"the effect is first among {len(c.random)} random directions ({c.effect:.3f}, up to {max(c.random):.3f}), but not "
            f"clearly: one in {1 / c.p_random:.0f} would do as much to the pairs, the answers differ from theirs with p = "
            f"{s.p_over_random:.3f}, and the sweep chose among several",
            _other_layers(report, options),
        )
    if c.p_shuffled is not None and c.effect > max(c.shuffled) and c.p_shuffled > _BEYOND_SHUFFLED:
        yield _Reason(
            f"the effect is not clearly larger than that of {len(c.shuffled)} directions {c.shuffled_kind} ({c.effect:.3f}, up "
            f"to {max(c.shuffled):.3f}, {probability(c.p_shuffled)})",
            f"add training pairs, or compare with more of these directions (extract.shuffled: {2 * len(c.shuffled)})",
        )
    if c.opposite >= 0 and report.margin.high > 0:
        text = f"the opposite sign moves the pairs the same way ({c.opposite:.3f}): the effect is not linear in the direction"
        yield _Reason(text, _smaller(report, options), "smaller")
    if s.p_value > LEVEL:
        text = (
            f"the answers do not change significantly: score {s.base:.2f} to {s.steered:.2f} ({s.effect}, p = "
            f"{s.p_value:.3f}) on {report.n_prompts} prompts"
        )
        if s.base > 0.9:
            yield _Reason(text, f"make the scorer stricter, the base scores {s.base:.2f} already")
        else:
            yield _Reason(text, _more("prompts", s.effect, report.n_prompts, _larger(report, options)))
    elif s.over_random.value > 0 and s.p_over_random > LEVEL:
        yield _Reason(
            f"the answers do not differ significantly from those under random directions of the same strength: "
            f"{s.steered:.2f} and {s.random:.2f} (difference {s.over_random}, {probability(s.p_over_random)})",
            _more("prompts", s.over_random, report.n_prompts, _larger(report, options)),
        )


def remarks(report: ValidationReport) -> list[str]:
    """What does not affect the verdict: is steering better than prompting, what was not controlled, and the corrections."""
    s = report.scores
    notes = list(map(str, report.confounds))
    for baseline, mean, over in (
        ("asking for it in the prompt", s.instructed, s.over_instructed),
        ("showing examples before the prompt", s.few_shot, s.over_few_shot),
    ):
        if mean is None or over is None:
            continue
        result = "no significant difference"
        if over.high < 0:
            result = f"{baseline.split()[0]} is better where the prompt is free"
        elif over.low > 0:
            result = "steering is better"
        notes.append(f"{baseline} scores {mean:.2f}, steering {s.steered:.2f} (difference {over}): {result}")
    if not report.controls.shuffled:
        notes.append("no directions from shuffled labels: the extraction made none, so that control is missing")
    q_values = [point.q_value for point in report.grid if point.q_value is not None]
    passed = sum(q <= LEVEL for q in q_values)
    notes.append(
        f"{passed} of {len(q_values)} grid points of the sweep move the validation pairs at a false discovery rate of "
        f"{LEVEL:.0%}; the test split was measured once, for the chosen point alone, so its p-values need no correction"
    )
    return notes
