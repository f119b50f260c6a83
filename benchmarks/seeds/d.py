"""Seed D, 'just steer it': one direction, a dial from nothing to collapse.

python -m benchmarks.seeds.d
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.ocean import ocean, stream
from benchmarks.record import ROOT
from benchmarks.seeds.dial import HEADER, RULE, Dial, Reading
from compile_steer.common.progress import Progress, ProgressBars
from compile_steer.pipeline.run import Run
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

BLOCK, CHOSEN = 10, 2.5
DOSES = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0)
RANDOM_DOSES = (1.0, 2.5, 4.0, 6.0)
BLOCKS = (8, 10, 12, 14)
PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS = 12, 8, 24, 32
FIGURE = "seed_d.svg"


def section(progress: Progress) -> list[str]:
    """The Markdown of seed D, measured now; leaves its figure in docs/."""
    with tempfile.TemporaryDirectory() as folder:
        run = ocean([], Path(folder), progress)
        directions = run.extract()
        dial = Dial(run, PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS)
        with progress.phase("seed D: the dial", 4) as advance:
            real = dial.read([directions.program(BLOCK, dose, "all") for dose in DOSES])
            advance(1)
            random = dial.read([_random(run, directions).scaled(dose) for dose in RANDOM_DOSES])
            advance(1)
            spread = dial.read([_several(directions)])
            advance(1)
            clamped = dial.read([_clamp(run, directions)])
            advance(1)
    return _report(run, directions, real, random, spread[0], clamped[0])


def _random(run: Run, directions: Directions) -> Program:
    """A random direction with the norm of the real one, at coefficient 1."""
    vector = directions.vectors[BLOCK]
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(run.recipe.seed))
    part = Intervention(Site(BLOCK), "add", noise / noise.norm() * vector.norm())
    return Program((part,), directions.model, directions.revision)


def _several(directions: Directions) -> Program:
    """The chosen dose, shared equally by several blocks."""
    parts = [Intervention(Site(k), "add", directions.vectors[k], CHOSEN / len(BLOCKS)) for k in BLOCKS]
    return Program(tuple(parts), directions.model, directions.revision)


def _clamp(run: Run, directions: Directions) -> Program:
    """The adaptive arm: each token's projection is set to what the chosen dose gives the mean token."""
    vector = directions.vectors[BLOCK]
    unit = vector / vector.norm()
    mean = float((stream(run, BLOCK, NEUTRAL) @ unit).mean())
    projection = mean + CHOSEN * float(vector.norm())
    return Program(
        (Intervention(Site(BLOCK), "clamp", unit, projection=projection),), directions.model, directions.revision
    )


def _report(
    run: Run,
    directions: Directions,
    real: list[Reading],
    random: list[Reading],
    spread: Reading,
    clamped: Reading,
) -> list[str]:
    seed = run.recipe.seed
    per_unit = float(directions.vectors[BLOCK].norm()) / float(stream(run, BLOCK, NEUTRAL).norm(dim=-1).median())
    slopes = _slopes(real)
    _draw(real, random, per_unit)
    lines = [
        "## D. 'Just steer it' (ocean)",
        "",
        f"`recipes/ocean.yaml`, block {BLOCK}, all positions; {PAIRS} test pairs, {PROMPTS} test prompts of {NEW_TOKENS} tokens, "
        f"{NEUTRAL} neutral texts; 95 % bootstrap intervals. Relative dose: ||c v|| over the median norm of the stream.",
        "",
        f"| coefficient | relative dose | {HEADER} | {run.recipe.ask} |",
        f"|---|---|{RULE}|---|",
    ]
    for dose, reading in zip(DOSES, real, strict=True):
        lines.append(f"| {dose:g} | {dose * per_unit:.2f} | {reading.row(seed)} | {reading.sample[:70]} |")
    for dose, reading in zip(RANDOM_DOSES, random, strict=True):
        lines.append(f"| random, {dose:g} | {dose * per_unit:.2f} | {reading.row(seed)} | {reading.sample[:70]} |")
    blocks = ", ".join(map(str, BLOCKS))
    lines += [
        f"| blocks {blocks}, {CHOSEN / len(BLOCKS):g} each | | {spread.row(seed)} | {spread.sample[:70]} |",
        f"| clamp to the mean of {CHOSEN:g} | | {clamped.row(seed)} | {clamped.sample[:70]} |",
        "",
        f"![The dial]({FIGURE})",
        "",
        "The same dose over prompts: the slope of a pair's effect over the coefficient "
        f"(up to {CHOSEN:g}) is {bootstrap_mean(slopes, seed=seed)} nats a token per unit on average, from {slopes.min():.3f} to "
        f"{slopes.max():.3f}, standard deviation {slopes.std(ddof=1):.3f}; {(slopes < 0).mean():.0%} of the pairs move the wrong way.",
        "",
    ]
    return lines


def _slopes(real: list[Reading]) -> np.ndarray:
    """Steerability of each pair (Tan et al. 2407.12404) up to the chosen coefficient."""
    used = [(dose, reading.effects) for dose, reading in zip(DOSES, real, strict=True) if dose <= CHOSEN]
    doses, effects = np.array([dose for dose, _ in used]), np.stack([effect for _, effect in used])
    slopes: np.ndarray = doses @ effects / (doses @ doses)
    return slopes


def _draw(real: list[Reading], random: list[Reading], per_unit: float) -> None:
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    effect, score, cost = figure.subplots(1, 3)
    for name, doses, readings in (("ocean", DOSES, real), ("random", RANDOM_DOSES, random)):
        x = [dose * per_unit for dose in doses]
        effect.plot(x, [float(one.effects.mean()) for one in readings], marker="o", label=name)
        score.plot(x, [float(one.scores.mean()) for one in readings], marker="o")
        score.plot(x, [one.repetition for one in readings], marker=".", linestyle=":")
        cost.semilogy(x, [one.perplexity_ratio for one in readings], marker="o")
    effect.set(xlabel="relative dose", ylabel="effect, nats/token")
    score.set(xlabel="relative dose", ylabel="score (dotted: repetition)")
    cost.set(xlabel="relative dose", ylabel="neutral perplexity, x base")
    effect.legend(fontsize=7)
    path = ROOT / "docs" / FIGURE
    figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    console = Console(width=160)
    console.print("\n".join(section(ProgressBars(console))), markup=False)
