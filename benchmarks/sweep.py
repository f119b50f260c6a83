"""What a sweep costs: the plain loop of forwards against ours, the solver and the layer search against the fine grid.

    python -m benchmarks.sweep [cost solver search]    # the parts to measure; the others stay as they were measured

The ways take turns on the same texts, and ratios are of processor time within one run: these machines are shared.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.ocean import ROOT, machine, ocean
from compile_steer.artifacts.files import save_text
from compile_steer.common.progress import Progress, ProgressBars
from compile_steer.models.logprobs import encode_pairs, log_softmax, margins
from compile_steer.models.tokens import batches, encode
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.options import Validate
from compile_steer.validate.report import GridPoint
from compile_steer.validate.sweep import measure_layers, search_layers

LAYERS = tuple(range(1, 30, 3))
COEFFICIENTS = (1.0, 2.0, 3.0, 4.0, 5.0)
# A grid that hardly reaches past the wall, where there is little to stop for.
MILD_LAYERS, MILD = (4, 13, 22), (1.0, 1.5, 2.0, 2.5, 3.0)
SEARCHED = (1.5, 2.0, 2.5)
FINE = tuple(round(1.2 * 1.1**k, 4) for k in range(14))
SETTINGS = ["validate.sweep_pairs=8", "validate.sweep_neutral=6"]
SEARCH_SETTINGS = ["validate.sweep_pairs=16", "validate.sweep_neutral=8"]
PAGE = ROOT / "docs" / "SWEEP.md"
BASELINE = "plain loop"
CEILING, NATS = 1.3, 0.5


Scores = dict[tuple[int, float], tuple[float, float]]
"""Contrast and perplexity ratio by layer and coefficient."""
Way = Callable[[int], Scores]
"""The cells of one layer."""


@dataclass
class Arm:
    """One way to sweep: its start-up (the base's scores) gives the step that measures a layer; CPU seconds in all."""

    start: Callable[[], Way]
    cells: Scores
    seconds: float = 0.0


def _listed(options: Validate) -> tuple[float, ...]:
    assert isinstance(options.coefficients, tuple)  # a benchmark of grids
    return options.coefficients


def plain(run: Run, directions: Directions, options: Validate) -> Way:
    """For each cell: hooks on, a full forward of all texts, all logits, the response's log-probabilities."""
    n = options.sweep_pairs
    texts = encode_pairs(run.model, run.data.validation[:n])
    texts += [encode(run.model.tokenizer, text) for text in run.data.neutral[: options.sweep_neutral]]

    def scores(program: Program | None) -> np.ndarray:
        found = np.zeros(len(texts))
        for batch in batches(run.model, texts):
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with torch.no_grad(), steered(run.model.model, program, roles=batch.roles):
                logits = run.model.model(**inputs).logits
            targets = batch.input_ids[:, 1:].unsqueeze(-1)
            log_p = log_softmax(logits[:, :-1]).gather(-1, targets).squeeze(-1)
            chosen = batch.predicts_response[:, :-1]
            found[list(batch.rows)] = ((log_p * chosen).sum(dim=1) / chosen.sum(dim=1)).numpy()
        return found

    base = scores(None)

    def step(layer: int) -> Scores:
        cells = {}
        for c in _listed(options):
            change = scores(directions.program(layer, c, options.positions)) - base
            effect = float(margins(change[: 2 * n]).mean())
            cells[layer, c] = effect, float(np.exp(-change[2 * n :].mean()))
        return cells

    return step


def ours(run: Run, directions: Directions, options: Validate, margin: float) -> Way:
    """The sweep as `validate` runs it, before any answers; `margin` infinite: without early stopping."""
    bench = _bench(run, options)

    def step(layer: int) -> Scores:
        return {
            (cell.layer, cell.coefficient): (cell.margin, cell.perplexity_ratio)
            for cell in _measured(bench, directions, options, [layer], margin)
            if cell.margin is not None and cell.perplexity_ratio is not None
        }

    return step


def _bench(run: Run, options: Validate) -> Bench:
    pairs = run.data.validation[: options.sweep_pairs]
    return Bench(run.model, pairs, run.data.neutral[: options.sweep_neutral])


def _measured(
    bench: Bench, directions: Directions, options: Validate, layers: Sequence[int], margin: float = 1.1
) -> list[GridPoint]:
    def make(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    return measure_layers(bench, options, layers, make, Progress(), margin)[0]


def cost(
    run: Run, directions: Directions, options: Validate, layers: Sequence[int], coefficients: tuple[float, ...]
) -> dict[str, Arm]:
    """Every way in turn, layer by layer."""
    grid = options.model_copy(update={"coefficients": coefficients})
    arms = {
        BASELINE: Arm(lambda: plain(run, directions, grid), {}),
        "ours, every cell": Arm(lambda: ours(run, directions, grid, math.inf), {}),
        "ours, stopping at the ceiling": Arm(lambda: ours(run, directions, grid, 1.1), {}),
    }
    steps: dict[str, Way] = {}
    with run.progress.phase("plain loop and ours in turn", len(layers)) as advance:
        for name, arm in arms.items():
            started = time.process_time()
            steps[name] = arm.start()
            arm.seconds += time.process_time() - started
        for layer in layers:
            for name, arm in arms.items():
                started = time.process_time()
                arm.cells.update(steps[name](layer))
                arm.seconds += time.process_time() - started
            advance(1)
    return arms


def cost_table(arms: dict[str, Arm]) -> list[str]:
    """Seconds, cells and the largest difference of any score from the plain loop's."""
    baseline = arms[BASELINE]
    lines = [
        "| | CPU seconds | cells run | times cheaper | largest score difference |",
        "|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        gap = max(
            abs(found - wanted)
            for cell, scores in arm.cells.items()
            for found, wanted in zip(scores, baseline.cells[cell], strict=True)
        )
        ratio, cells = baseline.seconds / arm.seconds, f"{len(arm.cells)} of {len(baseline.cells)}"
        lines.append(f"| {name} | {arm.seconds:.0f} | {cells} | {ratio:.1f} | {gap:.1e} |")
    return lines


def solver_table(run: Run, directions: Directions, options: Validate, layers: Sequence[int]) -> list[str]:
    """The solver's coefficient beside the fine grid's, with what either evaluated."""
    fine = options.model_copy(update={"coefficients": FINE})
    lines = ["| block | target | fine grid | solver | evaluations, grid | solver |", "|---|---|---|---|---|---|"]
    for layer in layers:
        bench = _bench(run, options)
        cells = _measured(bench, directions, fine, [layer], math.inf)
        below = [c for c in cells if (c.perplexity_ratio or math.inf) <= CEILING]
        nats = {c: bench.divergence(directions.program(layer, c, options.positions)) for c in FINE}
        nearest = min(nats, key=lambda c: abs(nats[c] - NATS))
        largest = max(c.coefficient for c in below)
        for target, wanted in (({"ceiling": CEILING}, largest), ({"kl": NATS}, nearest)):
            chosen = Validate.model_validate({**options.model_dump(), "coefficients": target})
            (cell,) = _measured(bench, directions, chosen, [layer])
            words = ", ".join(f"{key} {value:g}" for key, value in target.items())
            lines.append(
                f"| {layer} | {words} | {wanted:.3f} | {cell.coefficient:.3f} | {len(FINE)} | {cell.evaluations} |"
            )
    return lines


def search_table(run: Run, directions: Directions, options: Validate) -> list[str]:
    """Successive halving beside the grid over all blocks: the best coherent cell, and the work."""
    grid = options.model_copy(update={"coefficients": SEARCHED, "layers": "search"})

    def make(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    lines = ["| | best block | coefficient | contrast | CPU seconds |", "|---|---|---|---|---|"]
    every = range(directions.vectors.shape[0])
    started = time.process_time()
    cells = _measured(_bench(run, grid), directions, grid, every, math.inf)
    lines.append(_best("whole grid", cells, time.process_time() - started))
    started = time.process_time()
    left, _rungs = search_layers(run.model, run.data, grid, every, make, Progress())
    cells = _measured(_bench(run, grid), directions, grid, left)
    lines.append(_best("successive halving", cells, time.process_time() - started))
    return lines


def _best(name: str, cells: Sequence[GridPoint], seconds: float) -> str:
    coherent = [c for c in cells if c.margin is not None and (c.perplexity_ratio or math.inf) <= CEILING]
    best = max(coherent, key=lambda cell: cell.margin or 0.0)
    return f"| {name} | {best.layer} | {best.coefficient:g} | {best.margin:+.3f} | {seconds:.0f} |"


def _cost(run: Run, directions: Directions, options: Validate) -> list[str]:
    wide, mild = (
        cost_table(cost(run, directions, options, *grid)) for grid in ((LAYERS, COEFFICIENTS), (MILD_LAYERS, MILD))
    )
    return [
        "The plain loop runs every text through the whole model, with all logits, for each block and coefficient. The ways take turns "
        f"block by block. {len(LAYERS)} blocks ({LAYERS[0]} to {LAYERS[-1]}), coefficients {_numbers(COEFFICIENTS)}:",
        "",
        *wide,
        "",
        f"What stopping saves depends on how far the grid reaches past the ceiling. Blocks {_numbers(MILD_LAYERS)}, "
        f"coefficients {_numbers(MILD)}:",
        "",
        *mild,
    ]


def _solver(run: Run, directions: Directions, options: Validate) -> list[str]:
    return [
        f"Against a grid of {len(FINE)} coefficients, each 10 % above the one before; the solver's tolerance is 2 % (the grid's "
        "answer lies up to 10 % below the exact one for a ceiling, and up to 5 % to either side for a divergence):",
        "",
        *solver_table(run, directions, options, (10, 14)),
    ]


def _search(run: Run, directions: Directions, options: Validate) -> list[str]:
    return [
        f"Over all blocks with coefficients {_numbers(SEARCHED)} against the whole grid, itself with shared prefixes and batches: the "
        f"best cell with a neutral perplexity of at most x{CEILING:g}, by contrast:",
        "",
        *search_table(run, directions, options),
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


PARTS = {
    "cost": ("Layer x coefficient", _cost, SETTINGS),
    "solver": ("The coefficient by a solver", _solver, SETTINGS),
    "search": ("The block by successive halving", _search, SEARCH_SETTINGS),
}


def kept() -> dict[str, str]:
    """The sections that the page has, by title."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return {part.splitlines()[0]: part for part in text.split("## ")[1:]}


def main() -> None:
    """Measure the named parts, or all; the page is written after each."""
    found = kept()
    for name in sys.argv[1:] or PARTS:
        title, measure, settings = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            run = ocean(settings, Path(folder), ProgressBars(Console()))
            options = run.recipe.validate_
            lines = measure(run, run.extract(), options)
        texts = f"The ocean recipe: {options.sweep_pairs} validation pairs and {options.sweep_neutral} neutral texts."
        found[title] = "\n".join([title, "", f"Measured {machine()} {texts}", "", *lines, "", ""])
        head = ["# What a sweep costs", "", "Written by `python -m benchmarks.sweep`; do not edit.", "", ""]
        sections = [f"## {found[title]}" for title, _measure, _settings in PARTS.values() if title in found]
        save_text(PAGE, "\n".join(head) + "".join(sections).rstrip() + "\n")


if __name__ == "__main__":
    main()
