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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.ocean import ocean
from benchmarks.record import Record, machine, prose, table, timed
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
LIMIT, NATS = 1.3, 0.5
RECORD = Record[None]("SWEEP", "What a sweep costs", "python -m benchmarks.sweep")

Scores = dict[tuple[int, float], tuple[float, float]]
"""Margin and perplexity ratio by layer and coefficient."""
Step = Callable[[int], Scores]
"""Measures the grid points of one layer."""


@dataclass
class Condition:
    """One way to sweep: its start (the base's scores) gives the step that measures a layer; CPU seconds in all."""

    start: Callable[[], Step]
    points: Scores = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """The directions of a run, swept over blocks and coefficients."""

    run: Run
    directions: Directions
    options: ValidateOptions

    def program(self, layer: int, coefficient: float) -> Program:
        return self.directions.program(layer, coefficient, self.options.positions)

    def over(self, coefficients: tuple[float, ...], **changes: object) -> Sweep:
        """The same over other coefficients."""
        return replace(self, options=self.options.model_copy(update={"coefficients": coefficients, **changes}))

    def evaluator(self) -> ContrastEvaluator:
        data, options = self.run.data, self.options
        pairs, control = data.validation[: options.sweep_pairs], data.neutral[: options.sweep_neutral]
        return ContrastEvaluator(self.run.model, pairs, control)

    def measured(
        self, evaluator: ContrastEvaluator, layers: Sequence[int], stop_factor: float = 1.1
    ) -> list[GridPoint]:
        """The grid points as `validate` measures them before any answers; `stop_factor` infinite: without early stopping."""
        return measure_grid(evaluator, self.options, layers, self.program, Progress(), stop_factor)[0]

    def ours(self, stop_factor: float) -> Step:
        evaluator = self.evaluator()
        return lambda layer: {
            (point.layer, point.coefficient): (point.margin, point.perplexity_ratio)
            for point in self.measured(evaluator, [layer], stop_factor)
            if point.margin is not None and point.perplexity_ratio is not None
        }

    def plain(self) -> Step:
        """For each point: hooks on, a full forward of all texts, all logits, the response's log-probabilities."""
        model, data, options = self.run.model, self.run.data, self.options
        n = 2 * options.sweep_pairs
        texts = encode_pairs(model, data.validation[: options.sweep_pairs])
        texts += [encode(model.tokenizer, text) for text in data.neutral[: options.sweep_neutral]]

        def scores(program: Program | None) -> np.ndarray:
            means = np.zeros(len(texts))
            for batch in batches(model, texts):
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
                with torch.no_grad(), steered(model.model, program, roles=batch.roles):
                    logits = model.model(**inputs).logits
                targets = batch.input_ids[:, 1:].unsqueeze(-1)
                log_p = log_softmax(logits[:, :-1]).gather(-1, targets).squeeze(-1)
                chosen = batch.predicts_response[:, :-1]
                means[list(batch.rows)] = ((log_p * chosen).sum(dim=1) / chosen.sum(dim=1)).numpy()
            return means

        base = scores(None)
        coefficients = options.coefficients
        assert isinstance(coefficients, tuple)  # a grid, no target

        def step(layer: int) -> Scores:
            changes = {c: scores(self.program(layer, c)) - base for c in coefficients}
            return {
                (layer, c): (float(margins(change[:n]).mean()), float(np.exp(-change[n:].mean())))
                for c, change in changes.items()
            }

        return step


def cost(sweep: Sweep, layers: Sequence[int]) -> dict[str, Condition]:
    """Every way in turn, layer by layer."""
    conditions = {
        "plain loop": Condition(sweep.plain),
        "ours, every point": Condition(lambda: sweep.ours(math.inf)),
        "ours, stopping at the perplexity limit": Condition(lambda: sweep.ours(1.1)),
    }
    steps: dict[str, Step] = {}
    for name, condition in conditions.items():
        steps[name], seconds = timed(condition.start, time.process_time)
        condition.seconds += seconds
    for layer in layers:
        for name, condition in conditions.items():
            points, seconds = timed(partial(steps[name], layer), time.process_time)
            condition.points.update(points)
            condition.seconds += seconds
    return conditions


def cost_table(conditions: dict[str, Condition]) -> list[str]:
    """Seconds, points and the largest difference of any score from the plain loop's."""
    plain, rows = conditions["plain loop"], []
    for name, condition in conditions.items():
        differences = [
            abs(score - expected)
            for point, scores in condition.points.items()
            for score, expected in zip(scores, plain.points[point], strict=True)
        ]
        points = f"{len(condition.points)} of {len(plain.points)}"
        ratio, seconds = f"{plain.seconds / condition.seconds:.1f}", f"{condition.seconds:.0f}"
        rows.append((name, seconds, points, ratio, f"{max(differences):.1e}"))
    return table(" | CPU seconds | points run | times cheaper | largest score difference", rows)


def solver_table(sweep: Sweep, layers: Sequence[int]) -> list[str]:
    """The solver's coefficient beside the fine grid's, with what either evaluated."""
    rows = []
    for layer in layers:
        evaluator = sweep.evaluator()
        points = sweep.over(FINE).measured(evaluator, [layer], math.inf)
        largest = max(c.coefficient for c in points if (c.perplexity_ratio or math.inf) <= LIMIT)
        nats = {c: evaluator.divergence(sweep.program(layer, c)) for c in FINE}
        nearest = min(nats, key=lambda c: abs(nats[c] - NATS))
        for target, value, expected in (("perplexity_limit", LIMIT, largest), ("kl", NATS, nearest)):
            options = {**sweep.options.model_dump(), "coefficients": {target: value}}
            solved = replace(sweep, options=ValidateOptions.model_validate(options))
            (point,) = solved.measured(evaluator, [layer])
            coefficients = f"{expected:.3f}", f"{point.coefficient:.3f}"
            rows.append((layer, f"{target} {value:g}", *coefficients, len(FINE), point.evaluations))
    return table("block | target | fine grid | solver | evaluations, grid | solver", rows)


def search_table(sweep: Sweep) -> list[str]:
    """Successive halving beside the grid over all blocks: the best coherent point, and the work."""
    every = range(sweep.directions.vectors.shape[0])

    def whole() -> list[GridPoint]:
        return sweep.measured(sweep.evaluator(), every, math.inf)

    def halving() -> list[GridPoint]:
        context = replace(sweep.run.context, progress=Progress())
        layers, _rounds = search_layers(context, sweep.options, every, sweep.program)
        return sweep.measured(sweep.evaluator(), layers)

    rows = []
    for name, work in (("whole grid", whole), ("successive halving", halving)):
        points, seconds = timed(work, time.process_time)
        coherent = [c for c in points if c.margin is not None and (c.perplexity_ratio or math.inf) <= LIMIT]
        best = max(coherent, key=lambda point: point.margin or 0.0)
        rows.append((name, best.layer, f"{best.coefficient:g}", f"{best.margin:+.3f}", f"{seconds:.0f}"))
    return table(" | best block | coefficient | margin | CPU seconds", rows)


def cost_section(sweep: Sweep) -> list[str]:
    """The plain loop and ours on two grids."""
    mild = prose("sweep: a mild grid", blocks=_listed(MILD_LAYERS), coefficients=_listed(MILD))
    wide = cost_table(cost(sweep.over(COEFFICIENTS), LAYERS))
    return [*wide, "", mild, "", *cost_table(cost(sweep.over(MILD), MILD_LAYERS))]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


GAPS = {
    "first": LAYERS[0],
    "last": LAYERS[-1],
    "n_layers": len(LAYERS),
    "coefficients": _listed(COEFFICIENTS),
    "n_fine": len(FINE),
    "searched": _listed(SEARCHED),
    "limit": LIMIT,
}

PARTS: dict[str, tuple[str, Callable[[Sweep], list[str]], list[str]]] = {
    "cost": ("Layer x coefficient", cost_section, SETTINGS),
    "solver": ("The coefficient by a solver", lambda sweep: solver_table(sweep, (10, 14)), SETTINGS),
    "search": (
        "The block by successive halving",
        lambda sweep: search_table(sweep.over(SEARCHED, layers="search")),
        SEARCH_SETTINGS,
    ),
}


def main() -> None:
    """Measure the named parts, or all; the page is written after each."""
    for name in sys.argv[1:] or PARTS:
        heading, measure, settings = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            run = ocean(settings, Path(folder), ProgressBars(Console()))
            options = run.recipe.validate_
            lines = measure(Sweep(run, run.extract(), options))
        texts = f"The ocean recipe: {options.sweep_pairs} validation pairs and {options.sweep_neutral} control texts."
        introduction = prose(f"sweep: {name}", **GAPS)
        RECORD.save_section(heading, [f"Measured {machine()} {texts}", "", introduction, "", *lines])


if __name__ == "__main__":
    main()
