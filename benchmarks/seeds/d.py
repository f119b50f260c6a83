"""Seed D, 'just steer it': one direction, from nothing to collapse."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.ocean import ocean, stream
from benchmarks.record import DOCS, table
from benchmarks.seeds.readings import HEADER, Reader, Reading
from compile_steer.common.progress import Progress
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

HEADING = "D. 'Just steer it' (ocean)"
BLOCK, CHOSEN = 10, 2.5
COEFFICIENTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0)
RANDOM_COEFFICIENTS = (1.0, 2.5, 4.0, 6.0)
BLOCKS = (8, 10, 12, 14)
PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS = 12, 8, 24, 32
FIGURE = "seed_d.svg"


def section(progress: Progress) -> list[str]:
    """The Markdown of seed D, measured now; leaves its figure in docs/."""
    with tempfile.TemporaryDirectory() as folder:
        run = ocean([], Path(folder), progress)
        directions, seed = run.extract(), run.recipe.seed
        vector, states = directions.vectors[BLOCK], stream(run, BLOCK, NEUTRAL)
        reader = Reader(run, PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS)
        real = reader.read([directions.program(BLOCK, c, "all") for c in COEFFICIENTS])
        noise = random_program(directions, seed)
        random = reader.read([noise.scaled(c) for c in RANDOM_COEFFICIENTS])
        spread = Program(
            tuple(Intervention(Site(k), "add", directions.vectors[k], CHOSEN / len(BLOCKS)) for k in BLOCKS),
            directions.model,
            directions.revision,
        )
        # Each token's projection is set to what the chosen coefficient gives the mean token.
        unit = vector / vector.norm()
        clamp = Intervention(
            Site(BLOCK), "clamp", unit, projection=float((states @ unit).mean()) + CHOSEN * float(vector.norm())
        )
        (several,) = reader.read([spread])
        (clamped,) = reader.read([Program((clamp,), directions.model, directions.revision)])
    per_unit = float(vector.norm()) / float(states.norm(dim=-1).median())
    draw({"ocean": (COEFFICIENTS, real), "random": (RANDOM_COEFFICIENTS, random)}, per_unit, DOCS / FIGURE)
    return report(run.recipe.ask, real, random, several, clamped, per_unit, seed)


def random_program(directions: Directions, seed: int) -> Program:
    """A random direction with the norm of the real one, at coefficient 1."""
    vector = directions.vectors[BLOCK]
    noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    part = Intervention(Site(BLOCK), "add", noise / noise.norm() * vector.norm())
    return Program((part,), directions.model, directions.revision)


def report(
    ask: str,
    real: list[Reading],
    random: list[Reading],
    several: Reading,
    clamped: Reading,
    per_unit: float,
    seed: int,
) -> list[str]:
    """The section; `per_unit` is the relative strength of coefficient 1."""
    slopes = steerability(real)
    rows = [
        (f"{name}{c:g}", f"{c * per_unit:.2f}", *reading.cells(seed))
        for name, coefficients, readings in (("", COEFFICIENTS, real), ("random, ", RANDOM_COEFFICIENTS, random))
        for c, reading in zip(coefficients, readings, strict=True)
    ]
    rows.append((f"blocks {', '.join(map(str, BLOCKS))}, {CHOSEN / len(BLOCKS):g} each", "", *several.cells(seed)))
    rows.append((f"clamp to the mean of {CHOSEN:g}", "", *clamped.cells(seed)))
    return [
        f"`recipes/ocean.yaml`, block {BLOCK}, all positions; {PAIRS} test pairs, {PROMPTS} test prompts of {NEW_TOKENS} tokens, "
        f"{NEUTRAL} control texts; 95 % bootstrap intervals. Relative strength: ||c v|| over the median norm of the stream.",
        "",
        *table(f"coefficient | relative strength | {HEADER} | {ask}", rows),
        "",
        f"![Effect, score and perplexity by relative strength]({FIGURE})",
        "",
        "The same coefficient over prompts: the slope of a pair's effect over the coefficient "
        f"(up to {CHOSEN:g}) is {bootstrap_mean(slopes, seed=seed)} nats a token per unit on average, from {slopes.min():.3f} to "
        f"{slopes.max():.3f}, standard deviation {slopes.std(ddof=1):.3f}; {(slopes < 0).mean():.0%} of the pairs move the wrong way.",
    ]


def steerability(real: list[Reading]) -> np.ndarray:
    """The slope of each pair (Tan et al. 2407.12404) up to the chosen coefficient."""
    used = [(c, reading.effects) for c, reading in zip(COEFFICIENTS, real, strict=True) if c <= CHOSEN]
    coefficients, effects = np.array([c for c, _ in used]), np.stack([effect for _, effect in used])
    slopes: np.ndarray = coefficients @ effects / (coefficients @ coefficients)
    return slopes


def draw(curves: Mapping[str, tuple[tuple[float, ...], list[Reading]]], per_unit: float, path: Path) -> None:
    """Effect, score with repetition, and perplexity over the relative strength."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    effect, score, cost = figure.subplots(1, 3)
    for name, (coefficients, readings) in curves.items():
        x = [c * per_unit for c in coefficients]
        effect.plot(x, [float(one.effects.mean()) for one in readings], marker="o", label=name)
        score.plot(x, [float(one.scores.mean()) for one in readings], marker="o")
        score.plot(x, [one.repetition for one in readings], marker=".", linestyle=":")
        cost.semilogy(x, [one.perplexity_ratio for one in readings], marker="o")
    effect.set(xlabel="relative strength", ylabel="effect, nats/token")
    score.set(xlabel="relative strength", ylabel="score (dotted: repetition)")
    cost.set(xlabel="relative strength", ylabel="perplexity of control text, x base")
    effect.legend(fontsize=7)
    figure.savefig(path, format="svg", metadata={"Date": None})
