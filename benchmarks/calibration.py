"""Can the verdict be trusted? How often chance passes, how often a real direction does, and what compiling shows.

    python -m benchmarks.calibration

Resumes: what docs/calibration.jsonl holds is not measured again, so delete it to begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from scipy.stats import binomtest, spearmanr

from benchmarks.behaviours import KNOWN, recipe_for
from benchmarks.record import ROOT, Record, prose, table
from benchmarks.trials import COSINES, HELD_OUT, SETTINGS, Kind, Trial, trial
from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import ProgressBars
from compile_steer.models.text import Text
from compile_steer.pipeline.run import Run
from compile_steer.validation.confounds import find_confounds

RUNS = ROOT / "runs" / "calibration"  # the pairs that were written stay there
CHANCE: tuple[tuple[Kind, int], ...] = (("random", 0), ("shuffled", 0), ("random", 1), ("shuffled", 1), ("shuffled", 2))
# Confounds, by what is done to a positive side.
PLANTED: dict[str, Callable[[Text], Text]] = {
    "twice as long": lambda text: replace(text, response=f"{text.response} {text.response}"),
    "a first word": lambda text: replace(text, response=f"Well, {text.response}"),
    "a word": lambda text: replace(text, response=f"{text.response} Listen closely."),
    "a character": lambda text: replace(text, response=f"{text.response} #"),
    "line breaks": lambda text: replace(text, response="\n".join(text.response.split(" ", 2))),
    "capital letters": lambda text: replace(text, response=text.response.upper()),
    "another language": lambda text: replace(
        text, response=f"{text.response} Mais il est dans la maison avec les autres."
    ),
    "another prompt": lambda text: replace(text, prompt=f"Please: {text.prompt[:12]}"),
}
BEHAVIOURS, WEAKENED, CHANCE_COMPILED = 9, 2, 2  # the first so many, and of them


def planned(number: int) -> Iterator[tuple[Kind, int, bool]]:
    """Kind, index and whether it is compiled, for each direction of the behaviour with this number."""
    yield "real", 0, True
    yield "within limits", 0, False
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
    within = [one for one in shown if one.kind == "within limits"]
    groups = {"random or from shuffled labels": chance, "real": real, "real, weakened by noise": weakened}
    groups["real, within the limits of a recipe that names none"] = within
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
    if one.kind == "weakened":
        return f"weakened, cosine {COSINES[one.index]:g}"
    return "real, within limits" if one.kind == "within limits" else one.kind


def confounded(folder: Path, progress: ProgressBars) -> list[str]:
    """A confound of another kind planted in the training pairs of each behaviour: what is named then, and not without it."""
    rows = []
    kept = [known for known in KNOWN[:BEHAVIOURS] if RunPaths(folder / known.name, known.name).directions.is_file()]
    for known, (kind, plant) in zip(kept, PLANTED.items(), strict=False):
        run = Run.open(recipe_for(known, folder, SETTINGS), folder / known.name, progress)
        score = run.recipe.validate_.score.bind(run.model, run.data)
        pairs = [replace(pair, positive=plant(pair.positive)) for pair in run.data.train]
        before, after = (find_confounds(run.data, each, score, known.instruction) for each in (run.data.train, pairs))
        names = [found.name for _feature, found in after if found.name not in {one.name for _other, one in before}]
        rows.append(
            (known.name, kind, ", ".join(names) or "nothing", ", ".join(one.name for _f, one in before) or "nothing")
        )
    caught = sum(row[2] != "nothing" for row in rows)
    lines = [f"Planted in every positive side: {caught} of {len(rows)} are named.", ""]
    return lines + table("behaviour | planted | named besides | named without it", rows)


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
    RECORD.save_section("Are confounds named?", confounded(RUNS, progress))


if __name__ == "__main__":
    main()
