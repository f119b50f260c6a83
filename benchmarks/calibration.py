"""How often a direction of no meaning passes validation: random and shuffled-label directions in the real one's place.

    python -m benchmarks.calibration [COUNT]

Each goes through the whole stage, its own choice of layer and coefficient included, on fewer texts and prompts
than a recipe's own run has: a gate that chance passes here, it would pass there more rarely.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ocean import ROOT, machine, ocean
from compile_steer.directions import Directions
from compile_steer.errors import RecipeError
from compile_steer.extract.found import as_long_as
from compile_steer.files import save_text
from compile_steer.pipeline import run_extract
from compile_steer.progress import BarMeter, Meter
from compile_steer.run import Run
from compile_steer.validate import ValidationReport, validate

SETTINGS = [
    "extract.shuffled=12",
    "validate.layers=[10,14]",
    "validate.coefficients=[1.5,2.5]",
    "validate.instruction=''",
    "validate.few_shot=0",
    "validate.mismatched=null",
    "validate.sweep_pairs=4",
    "validate.sweep_neutral=4",
    "validate.sweep_prompts=4",
    "validate.sweep_layers=1",
    "validate.control_pairs=4",
    "validate.dose_prompts=2",
    "validate.prompts=12",
    "validate.max_new_tokens=16",
    "validate.max_perplexity_ratio=3",
    "validate.max_repetition=0.6",
]
PAIRS, NEUTRAL = 12, 6


@dataclass(frozen=True)
class Trial:
    """One direction put in the real one's place, and what validation said of it."""

    kind: str
    verdict: str
    reasons: list[str]
    effect: float
    p_random: float
    p_shuffled: float | None
    score: float
    seconds: float


def in_place(real: Directions, kind: str, index: int) -> Directions:
    """`real` with its vectors replaced: by random ones as long, or by its `index`-th shuffled ones, left out of the controls.

    The real direction is 'real'.
    """
    if kind == "real":
        return real
    if kind == "shuffled":
        others = [n for n in range(len(real.shuffled)) if n != index]
        return replace(real, vectors=real.shuffled[index], shuffled=real.shuffled[others])
    noise = torch.randn(real.vectors.shape, generator=torch.Generator().manual_seed(10_000 + index))
    return replace(real, vectors=as_long_as(noise, real.vectors))


def trial(run: Run, directions: Directions, kind: str) -> Trial:
    """Validate `directions` with the run's recipe, on a part of its test data."""
    data = replace(run.behaviour, test=run.behaviour.test[:PAIRS], neutral=run.behaviour.neutral[:NEUTRAL])
    started = time.perf_counter()
    try:
        report, _rows = validate(run.recipe, run.loaded, data, directions, lambda _program: "", "", Meter())
    except RecipeError as error:  # no coherent cell: refused before the test
        return Trial(kind, "refused", [str(error)], 0.0, 1.0, None, 0.0, time.perf_counter() - started)
    return _trial(kind, report, time.perf_counter() - started)


def _trial(kind: str, report: ValidationReport, seconds: float) -> Trial:
    c = report.controls
    return Trial(
        kind, report.verdict, report.reasons, c.effect, c.p_random, c.p_shuffled, report.scores.effect.value, seconds
    )


def trials(run: Run, count: int, meter: Meter) -> Iterator[Trial]:
    """The real direction, then `count` of no meaning, random and shuffled in turn while shuffled ones last."""
    real = run_extract(run)
    kinds = [("real", 0)]
    kinds += [("shuffled", n // 2) if n % 2 and n // 2 < len(real.shuffled) else ("random", n) for n in range(count)]
    with meter.phase("directions in the real one's place", len(kinds)) as tick:
        for kind, index in kinds:
            yield trial(run, in_place(real, kind, index), kind)
            tick(1)


def page(name: str, found: list[Trial]) -> list[str]:
    """One line a direction, and how many of no meaning passed."""
    fakes = [one for one in found if one.kind != "real"]
    passed = sum(one.verdict == "pass" for one in fakes)
    return [
        f"## {name}: {passed} of {len(fakes)} directions of no meaning passed",
        "",
        "| direction | verdict | contrast | p, random | p, shuffled | change of score | seconds | first reason |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {one.kind} | {one.verdict} | {one.effect:+.3f} | {one.p_random:.2g} | "
            f"{'-' if one.p_shuffled is None else format(one.p_shuffled, '.2g')} | {one.score:+.2f} | {one.seconds:.0f} | "
            f"{one.reasons[0].split(';')[0]} |"
            for one in found
        ),
        "",
    ]


def main() -> None:
    """Run the ocean behaviour and write docs/CALIBRATION.md."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as folder:
        run = ocean(SETTINGS, Path(folder), BarMeter(Console()))
        found = list(trials(run, count, run.meter))
    head = [
        "# How often chance passes validation",
        "",
        "Written by `python -m benchmarks.calibration`; do not edit.",
        "",
        f"{machine()} Each direction goes through the whole stage: {', '.join(SETTINGS[1:3])}; {PAIRS} test pairs.",
        "",
    ]
    save_text(ROOT / "docs" / "CALIBRATION.md", "\n".join([*head, *page(run.recipe.name, found)]))


if __name__ == "__main__":
    main()
