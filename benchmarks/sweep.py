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
from dataclasses import dataclass, replace
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
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.report import GridPoint
from compile_steer.validation.sweep import measure_grid, search_layers

LAYERS = tuple(range(1, 30, 3))
COEFFICIENTS = (1.0, 2.0, 3.0, 4.0, 5.0)
# A grid that hardly reaches past the perplexity limit, where there is little to stop for.
MILD_LAYERS, MILD = (4, 13, 22), (1.0, 1.5, 2.0, 2.5, 3.0)
SEARCHED = (1.5, 2.0, 2.5)
FINE = tuple(round(1.2 * 1.1**k, 4) for k in range(14))
SETTINGS = ["validate.sweep_pairs=8", "validate.sweep_neutral=6"]
SEARCH_SETTINGS = ["validate.sweep_pairs=16", "validate.sweep_neutral=8"]
PAGE = ROOT / "docs" / "SWEEP.md"
BASELINE = "plain loop"
LIMIT, NATS = 1.3, 0.5


Scores = dict[tuple[int, float], tuple[float, float]]
"""Margin and perplexity ratio by layer and coefficient."""
Way = Callable[[int], Scores]
"""The points of one layer."""


@dataclass
class Condition:
    """One way to sweep: its start-up (the base's scores) gives the step that measures a layer; CPU seconds in all."""

    start: Callable[[], Way]
    points: Scores
    seconds: float = 0.0


def _listed(options: ValidateOptions) -> tuple[float, ...]:
    assert isinstance(options.coefficients, tuple)  # a benchmark of grids
    return options.coefficients


def plain(run: Run, directions: Directions, options: ValidateOptions) -> Way:
    """For each point: hooks on, a full forward of all texts, all logits, the response's log-probabilities."""
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
        points = {}
        for c in _listed(options):
            change = scores(directions.program(layer, c, options.positions)) - base
            effect = float(margins(change[: 2 * n]).mean())
            points[layer, c] = effect, float(np.exp(-change[2 * n :].mean()))
        return points

    return step


def ours(run: Run, directions: Directions, options: ValidateOptions, stop_factor: float) -> Way:
    """The sweep as `validate` runs it, before any answers; `stop_factor` infinite: without early stopping."""
    evaluator = _evaluator(run, options)

    def step(layer: int) -> Scores:
        return {
            (point.layer, point.coefficient): (point.margin, point.perplexity_ratio)
            for point in _measured(evaluator, directions, options, [layer], stop_factor)
            if point.margin is not None and point.perplexity_ratio is not None
        }

    return step


def _evaluator(run: Run, options: ValidateOptions) -> ContrastEvaluator:
    pairs = run.data.validation[: options.sweep_pairs]
    return ContrastEvaluator(run.model, pairs, run.data.neutral[: options.sweep_neutral])


def _measured(
    evaluator: ContrastEvaluator,
    directions: Directions,
    options: ValidateOptions,
    layers: Sequence[int],
    stop_factor: float = 1.1,
) -> list[GridPoint]:
    def make(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    return measure_grid(evaluator, options, layers, make, Progress(), stop_factor)[0]


def cost(
    run: Run, directions: Directions, options: ValidateOptions, layers: Sequence[int], coefficients: tuple[float, ...]
) -> dict[str, Condition]:
    """Every way in turn, layer by layer."""
    grid = options.model_copy(update={"coefficients": coefficients})
    conditions = {
        BASELINE: Condition(lambda: plain(run, directions, grid), {}),
        "ours, every point": Condition(lambda: ours(run, directions, grid, math.inf), {}),
        "ours, stopping at the perplexity limit": Condition(lambda: ours(run, directions, grid, 1.1), {}),
    }
    steps: dict[str, Way] = {}
    with run.progress.phase("plain loop and ours in turn", len(layers)) as advance:
        for name, condition in conditions.items():
            started = time.process_time()
            steps[name] = condition.start()
            condition.seconds += time.process_time() - started
        for layer in layers:
            for name, condition in conditions.items():
                started = time.process_time()
                condition.points.update(steps[name](layer))
                condition.seconds += time.process_time() - started
            advance(1)
    return conditions


def cost_table(conditions: dict[str, Condition]) -> list[str]:
    """Seconds, points and the largest difference of any score from the plain loop's."""
    baseline = conditions[BASELINE]
    lines = [
        "| | CPU seconds | points run | times cheaper | largest score difference |",
        "|---|---|---|---|---|",
    ]
    for name, condition in conditions.items():
        gap = max(
            abs(found - wanted)
            for point, scores in condition.points.items()
            for found, wanted in zip(scores, baseline.points[point], strict=True)
        )
        ratio, points = baseline.seconds / condition.seconds, f"{len(condition.points)} of {len(baseline.points)}"
        lines.append(f"| {name} | {condition.seconds:.0f} | {points} | {ratio:.1f} | {gap:.1e} |")
    return lines


def solver_table(run: Run, directions: Directions, options: ValidateOptions, layers: Sequence[int]) -> list[str]:
    """The solver's coefficient beside the fine grid's, with what either evaluated."""
    fine = options.model_copy(update={"coefficients": FINE})
    lines = ["| block | target | fine grid | solver | evaluations, grid | solver |", "|---|---|---|---|---|---|"]
    for layer in layers:
        evaluator = _evaluator(run, options)
        points = _measured(evaluator, directions, fine, [layer], math.inf)
        below = [c for c in points if (c.perplexity_ratio or math.inf) <= LIMIT]
        nats = {c: evaluator.divergence(directions.program(layer, c, options.positions)) for c in FINE}
        nearest = min(nats, key=lambda c: abs(nats[c] - NATS))
        largest = max(c.coefficient for c in below)
        for target, wanted in (({"perplexity_limit": LIMIT}, largest), ({"kl": NATS}, nearest)):
            chosen = ValidateOptions.model_validate({**options.model_dump(), "coefficients": target})
            (point,) = _measured(evaluator, directions, chosen, [layer])
            words = ", ".join(f"{key} {value:g}" for key, value in target.items())
            lines.append(
                f"| {layer} | {words} | {wanted:.3f} | {point.coefficient:.3f} | {len(FINE)} | {point.evaluations} |"
            )
    return lines


def search_table(run: Run, directions: Directions, options: ValidateOptions) -> list[str]:
    """Successive halving beside the grid over all blocks: the best coherent point, and the work."""
    grid = options.model_copy(update={"coefficients": SEARCHED, "layers": "search"})

    def make(layer: int, coefficient: float) -> Program:
        return directions.program(layer, coefficient, options.positions)

    lines = ["| | best block | coefficient | margin | CPU seconds |", "|---|---|---|---|---|"]
    every = range(directions.vectors.shape[0])
    started = time.process_time()
    points = _measured(_evaluator(run, grid), directions, grid, every, math.inf)
    lines.append(_best("whole grid", points, time.process_time() - started))
    started = time.process_time()
    left, _rungs = search_layers(replace(run.context, progress=Progress()), grid, every, make)
    points = _measured(_evaluator(run, grid), directions, grid, left)
    lines.append(_best("successive halving", points, time.process_time() - started))
    return lines


def _best(name: str, points: Sequence[GridPoint], seconds: float) -> str:
    coherent = [c for c in points if c.margin is not None and (c.perplexity_ratio or math.inf) <= LIMIT]
    best = max(coherent, key=lambda point: point.margin or 0.0)
    return f"| {name} | {best.layer} | {best.coefficient:g} | {best.margin:+.3f} | {seconds:.0f} |"


def _cost(run: Run, directions: Directions, options: ValidateOptions) -> list[str]:
    wide, mild = (
        cost_table(cost(run, directions, options, *grid)) for grid in ((LAYERS, COEFFICIENTS), (MILD_LAYERS, MILD))
    )
    return [
        "The plain loop runs every text through the whole model, with all logits, for each block and coefficient. The ways take turns "
        f"block by block. {len(LAYERS)} blocks ({LAYERS[0]} to {LAYERS[-1]}), coefficients {_numbers(COEFFICIENTS)}:",
        "",
        *wide,
        "",
        f"What stopping saves depends on how far the grid reaches past the perplexity limit. Blocks {_numbers(MILD_LAYERS)}, "
        f"coefficients {_numbers(MILD)}:",
        "",
        *mild,
    ]


def _solver(run: Run, directions: Directions, options: ValidateOptions) -> list[str]:
    return [
        f"Against a grid of {len(FINE)} coefficients, each 10 % above the one before; the solver's tolerance is 2 % (the grid's "
        "answer lies up to 10 % below the exact one for a perplexity limit, and up to 5 % to either side for a divergence):",
        "",
        *solver_table(run, directions, options, (10, 14)),
    ]


def _search(run: Run, directions: Directions, options: ValidateOptions) -> list[str]:
    return [
        f"Over all blocks with coefficients {_numbers(SEARCHED)} against the whole grid, itself with shared prefixes and batches: the "
        f"best point with a perplexity of control text of at most x{LIMIT:g}, by margin:",
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
        texts = f"The ocean recipe: {options.sweep_pairs} validation pairs and {options.sweep_neutral} control texts."
        found[title] = "\n".join([title, "", f"Measured {machine()} {texts}", "", *lines, "", ""])
        head = ["# What a sweep costs", "", "Written by `python -m benchmarks.sweep`; do not edit.", "", ""]
        sections = [f"## {found[title]}" for title, _measure, _settings in PARTS.values() if title in found]
        save_text(PAGE, "\n".join(head) + "".join(sections).rstrip() + "\n")


if __name__ == "__main__":
    main()
