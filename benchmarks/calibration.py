"""Can the verdict be trusted? How often chance passes, how often a real direction does, and what compiling shows.

    python -m benchmarks.calibration

Resumes: what docs/calibration.jsonl holds is not measured again, so delete it to begin anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from scipy.stats import binomtest, spearmanr

from benchmarks.behaviours import KNOWN, recipe_for
from benchmarks.record import ROOT, Record, prose, table
from benchmarks.trials import COSINES, HELD_OUT, SETTINGS, Kind, Trial, trial
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import ProgressBars
from compile_steer.pipeline.run import Run

RUNS = ROOT / "runs" / "calibration"  # the pairs that were written stay there
CHANCE: tuple[tuple[Kind, int], ...] = (("random", 0), ("shuffled", 0), ("random", 1), ("shuffled", 1), ("shuffled", 2))
BEHAVIOURS, WEAKENED, CHANCE_COMPILED = 9, 2, 2  # the first so many, and of them


def planned(number: int) -> Iterator[tuple[Kind, int, bool]]:
    """Kind, index and whether it is compiled, for each direction of the behaviour with this number."""
    yield "real", 0, True
    if number < WEAKENED:
        yield "weakened", number % len(COSINES), True
    for kind, index in CHANCE:
        yield kind, index, number < CHANCE_COMPILED and index == 0


def measured(found: list[Trial], folder: Path, progress: ProgressBars) -> Iterator[Trial]:
    """The trials that `found` lacks, one after the other."""
    done = {(one.behaviour, one.kind, one.index) for one in found}
    without_pairs = {one.behaviour for one in found if one.verdict == "no pairs"}
    for number, known in enumerate(KNOWN[:BEHAVIOURS]):
        if known.name in without_pairs:
            continue
        left = [one for one in planned(number) if (known.name, *one[:2]) not in done]
        if not left:
            continue
        try:
            run = Run.open(recipe_for(known, folder, SETTINGS), folder / known.name, progress)
        except RecipeError as error:  # the model does not show it often enough when it is asked
            yield Trial(known.name, "real", 0, "no pairs", str(error), 0.0)
            continue
        real = run.extract()
        for kind, index, compiles in left:
            yield trial(run, real, kind, index, compiles)


def rate(found: list[Trial]) -> str:
    """How many passed, with Wilson's 95 % interval."""
    passed = sum(one.verdict == "pass" for one in found)
    bounds = binomtest(passed, len(found)).proportion_ci(method="wilson")
    return f"{passed} of {len(found)} ({bounds.low:.0%} to {bounds.high:.0%})"


def report(found: list[Trial]) -> list[str]:
    """Rates, every trial, and what came of those that were compiled."""
    shown = [one for one in found if one.verdict != "no pairs"]
    chance = [one for one in shown if one.kind in ("random", "shuffled")]
    real = [one for one in shown if one.kind == "real"]
    weakened = [one for one in shown if one.kind == "weakened"]
    groups = {"random or from shuffled labels": chance, "real": real, "real, weakened by noise": weakened}
    rates = [(name, rate(group)) for name, group in groups.items() if group]
    lines = [*table("directions | passed (95 % interval, Wilson)", rates), "", *trials_table(shown)]
    dropped = [one.behaviour for one in found if one.verdict == "no pairs"]
    if dropped:
        lines += ["", f"Not counted, since the model shows them too rarely when it is asked: {', '.join(dropped)}."]
    return [*lines, "", *prediction([one for one in shown if one.compiled is not None])]


def trials_table(found: list[Trial]) -> list[str]:
    """Every trial in a row."""
    return table(
        "behaviour | direction | verdict | block, coefficient | contrast | p, random, pairs | p, shuffled | score | p, random, answers | "
        "perplexity | first reason",
        (
            f"{one.behaviour} | {named(one)} | {one.verdict} | {one.layer}, {one.coefficient:g} | {one.contrast:+.3f} | "
            f"{one.p_random:.2g} | {'-' if one.p_shuffled is None else f'{one.p_shuffled:.2g}'} | "
            f"{one.score_base:.2f} to {one.score_base + one.score:.2f} | {one.p_over_random:.2g} | x{one.perplexity:.2f} | {one.reason}"
            for one in found
        ),
    )


def named(one: Trial) -> str:
    """The kind of direction, with how far it was weakened."""
    return f"weakened, cosine {COSINES[one.index]:g}" if one.kind == "weakened" else one.kind


def prediction(found: list[Trial]) -> list[str]:
    """Does the verdict predict what the compiled model does?"""
    if not found:
        return []
    pairs = [(one, one.compiled) for one in found if one.compiled is not None]
    rank = spearmanr([one.score for one, _ in pairs], [after.score for _, after in pairs]).statistic
    lines = [
        "## Does the verdict predict the compile?",
        "",
        f"Each compiled by `closed_form`, whatever the verdict. Recovery is the compiled change of the contrast on the test pairs "
        f"over the steered one ('-' where the steered one's interval holds 0); the share is of KL(steered‖base), on {HELD_OUT} "
        "held-out prompts. Scores are changes of the base's, on the test prompts.",
        "",
        f"The change of score that validation measured and the compiled model's rank alike: Spearman {rank:.2f} over {len(pairs)} "
        "directions. Mean change of score when compiled, by verdict: "
        + ", ".join(
            f"{verdict} {sum(group) / len(group):+.2f} ({len(group)})"
            for verdict in ("pass", "inconclusive", "fail")
            if (group := [after.score for one, after in pairs if one.verdict == verdict])
        )
        + ".",
        "",
    ]
    return lines + table(
        "behaviour | direction | verdict | contrast: steered | compiled | recovery | score: steered | compiled | share of KL left",
        (
            f"{one.behaviour} | {named(one)} | {one.verdict} | {one.contrast:+.3f} | {after.contrast:+.3f} | "
            f"{f'{after.contrast / one.contrast:.2f}' if one.contrast_low > 0 else '-'} | "
            f"{one.score:+.2f} | {after.score:+.2f} | {after.share:.2%}"
            for one, after in sorted(pairs, key=lambda pair: -pair[0].score)
        ),
    )


RECORD = Record(
    "CALIBRATION",
    "Can the verdict be trusted?",
    "python -m benchmarks.calibration",
    prose("calibration: setting", settings=", ".join(f"`{setting}`" for setting in SETTINGS)),
    Trial,
)


def main() -> None:
    """Measure what is left."""
    progress = ProgressBars(Console(width=132))
    RECORD.resume(
        lambda found: measured(found, RUNS, progress),
        report,
        lambda one: f"{one.behaviour} {named(one)}: {one.verdict} ({one.seconds:.0f} s) {one.reason}",
    )


if __name__ == "__main__":
    main()
