"""Layer x coefficient on validation data: which grid point is worth a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from compile_steer.common.errors import LayoutError, RecipeError
from compile_steer.common.figures import decisive
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Context
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score
from compile_steer.stats import sign_flip
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.program import Program
from compile_steer.validation.choice import choose, cost_of
from compile_steer.validation.coefficients import climb, solve
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import SolverTarget, ValidateOptions
from compile_steer.validation.report import GridPoint, Rung

ProgramAt = Callable[[int, float], Program]
"""(layer, coefficient) -> the program."""

# A layer's larger coefficients are skipped once the perplexity ratio exceeds the limit by this factor. Above 1, because the
# few texts of the sweep are a sample.
STOP_FACTOR = 1.1
# The layer search begins with as few pairs as can tell bad layers from good ones, and leaves more layers than are
# answered, because a margin does not order the best ones reliably.
_FIRST_PAIRS = 4
_LAST_LAYERS = 4


@dataclass(frozen=True)
class Sweep:
    """All grid points, the chosen one, each pair's steerability [n_pairs] at its layer, and the layer search."""

    grid: list[GridPoint]
    best: GridPoint
    slopes: np.ndarray
    layer_search: list[Rung]


def choose_layers(options: ValidateOptions, n_layers: int) -> list[int]:
    """The recipe's layers; for 'auto' five from 30 % to 70 % of the depth, for 'search' all; raises `LayoutError`."""
    if options.layers == "search":
        return list(range(n_layers))
    if options.layers == "auto":
        return sorted({round(n_layers * depth) for depth in (0.3, 0.4, 0.5, 0.6, 0.7)} - {n_layers})
    missing = [layer for layer in options.layers if isinstance(layer, int) and layer >= n_layers]
    if missing:
        raise LayoutError(
            f"validate.layers: {', '.join(map(str, missing))} not in this model, which has blocks 0 to {n_layers - 1}. "
            "Name other layers, or 'auto'."
        )
    return sorted(set(map(int, options.layers)))


def candidates(options: ValidateOptions, directions: Directions) -> list[int]:
    """The layers to try: the recipe's that have a direction, or `EVERY_BLOCK` if one program holds all.

    Raises:
        LayoutError: the model lacks a layer. RecipeError: layers are named for a program that acts at every block, or
            no layer has a direction.
    """
    if directions.joint:
        if options.layers != "auto":
            raise RecipeError(
                f"validate.layers: found {options.layers!r}, but these vectors act at every block at once; only the "
                "coefficient is to be chosen. Leave layers out."
            )
        return [EVERY_BLOCK]
    available = directions.layers
    layers = choose_layers(options, directions.vectors.shape[0])
    usable = [layer for layer in layers if layer in available]
    if isinstance(options.layers, str):
        usable = usable or list(available)  # an imported file may hold one layer, outside of the usual ones
    elif available and len(usable) < len(layers):
        missing = ", ".join(str(layer) for layer in layers if layer not in available)
        raise RecipeError(
            f"validate.layers: {missing} without a direction; there is one for {', '.join(map(str, available))}. Name "
            "these, or 'auto'."
        )
    if not usable:
        raise RecipeError(
            f"validate.layers: the directions of blocks {', '.join(map(str, layers))} are all 0. Name later blocks."
        )
    return usable


def sweep(
    context: Context,
    options: ValidateOptions,
    layers: Sequence[int],
    program_at: ProgramAt,
    evaluator: ContrastEvaluator,
    score: Score,
    base: Answers,
) -> Sweep:
    """Measure every grid point by margin and perplexity and the best layers by generation, and choose one.

    Raises `RecipeError` where no point is coherent; what was measured is noted before. `evaluator` has the validation pairs,
    control texts and questions of the sweep, `base` are the base's answers to its prompts.
    """
    from scipy.stats import false_discovery_control

    rungs: list[Rung] = []
    if options.layers == "search":
        layers, rungs = search_layers(context, options, layers, program_at)
    grid, effects = measure_grid(evaluator, options, layers, program_at, context.progress)

    # Significance: a sign-flip test per point, corrected over the whole sweep.
    p_values = {key: sign_flip(rows, context.seed) for key, rows in effects.items()}
    # Benjamini and Hochberg 1995. Where every point was skipped there are no p-values, which scipy refuses.
    q_values: dict[tuple[int, float], float] = {}
    if p_values:
        q_values = dict(zip(p_values, map(float, false_discovery_control(list(p_values.values()))), strict=True))
    for index, point in enumerate(grid):
        key = point.layer, point.coefficient
        grid[index] = replace(point, p_value=p_values.get(key), q_value=q_values.get(key))

    # The best layers by the margin of their coherent points.
    limit = options.max_perplexity_ratio
    coherent = [n for n, p in enumerate(grid) if not p.skipped and (p.perplexity_ratio or math.inf) <= limit]
    strongest: dict[int, float] = {}
    for n in coherent:
        strongest[grid[n].layer] = max(grid[n].margin or 0.0, strongest.get(grid[n].layer, -np.inf))
    best_layers = sorted(strongest, key=lambda layer: -strongest[layer])[: options.sweep_layers]

    # Their answers, because a margin is not yet a behaviour.
    prompts = [pair.prompt for pair in context.data.validation[: options.sweep_prompts]]
    with context.progress.phase("sweep: answers of the best layers", len(best_layers)) as advance:
        for layer in best_layers:
            at_layer = [n for n in coherent if grid[n].layer == layer]
            requests = [Request(prompts, program_at(layer, grid[n].coefficient)) for n in at_layer]
            answers = answer(context.model, requests, score, options.max_new_tokens, context.data.questions)
            for n, answered in zip(at_layer, answers, strict=True):
                means = float(answered.scores.mean()), float(answered.repetition.mean())
                grid[n] = replace(grid[n], score=means[0], repetition=means[1])
                grid[n] = replace(grid[n], cost=cost_of(grid[n], options, float(base.repetition.mean())))
            advance(1)
    try:
        best = choose(grid, options, float(base.scores.mean()), float(base.repetition.mean()), len(prompts))
    except RecipeError:
        for point in grid:  # whoever is to choose other coefficients must see what these did
            context.progress.note(str(point))
        raise
    # Steerability (Tan et al. 2407.12404): the slope of a pair's effect over the coefficient, by least squares through
    # the origin, where the effect is 0 by definition.
    at_best = {c: rows for (layer, c), rows in effects.items() if layer == best.layer}
    coefficients = np.array(list(at_best))
    slopes = coefficients @ np.stack(list(at_best.values())) / (coefficients @ coefficients)
    return Sweep(grid, best, slopes, rungs)


def measure_grid(
    evaluator: ContrastEvaluator,
    options: ValidateOptions,
    layers: Sequence[int],
    program_at: ProgramAt,
    progress: Progress,
    stop_factor: float = STOP_FACTOR,
) -> tuple[list[GridPoint], dict[tuple[int, float], np.ndarray]]:
    """The grid points of every layer, and the effects [n_pairs] of those that were measured; skipped ones give the reason."""
    grid: list[GridPoint] = []
    effects: dict[tuple[int, float], np.ndarray] = {}
    start = 1.0  # of the solver: the coefficient of the layer before, since neighbours have similar ones
    with progress.phase("sweep: log-likelihood margin", len(layers)) as advance:
        for number in layers:
            layer = _Layer(evaluator, number, program_at)
            if isinstance(options.coefficients, SolverTarget):
                points = [layer.solve(options.coefficients, start)]
                start = points[0].coefficient if not points[0].skipped else start
            else:
                points = layer.within(options.max_perplexity_ratio * stop_factor, options.coefficients)
            measured = [point.coefficient for point in points if not point.skipped]
            rows = dict(zip(measured, layer.effects(measured), strict=True))
            effects |= {(number, c): row for c, row in rows.items()}
            means = {c: float(row.mean()) for c, row in rows.items()}
            for point in points:
                c = point.coefficient
                grid.append(point if point.skipped else replace(point, margin=means[c], lost_answers=layer.lost(c)))
            advance(1)
    return grid, effects


def search_layers(
    context: Context, options: ValidateOptions, layers: Sequence[int], program_at: ProgramAt
) -> tuple[list[int], list[Rung]]:
    """Successive halving of `layers` (Jamieson and Talwalkar 1502.07943); returns those that are left, and every rung.

    Few pairs for all layers; the better half is kept and the pairs are doubled. A layer is rated by its margin at its
    largest coherent coefficient.
    """
    data, most = context.data, min(options.sweep_pairs, len(context.data.validation))
    keep = max(_LAST_LAYERS, options.sweep_layers)
    left, rungs, n = list(layers), [], _FIRST_PAIRS
    known: dict[int, float] = {}  # the size of each layer's coefficient in the rung before
    with context.progress.phase("sweep: search over all blocks", 2 * len(left) - keep) as advance:
        while len(left) > keep:
            pairs = min(n, most)
            n_control = max(_FIRST_PAIRS, round(options.sweep_neutral * pairs / most))
            evaluator = ContrastEvaluator(context.model, data.validation[:pairs], data.neutral[:n_control])
            margins: dict[int, float] = {}
            near = 1.0
            for number in left:
                layer = _Layer(evaluator, number, program_at)
                largest = layer.largest_coherent(options, known.get(number, near))
                near = known[number] = max(map(abs, largest), default=near)
                margins[number] = float(max(layer.effects(largest).mean(axis=1), default=-math.inf))
                advance(1)
            rungs.append(Rung(pairs, margins))
            half = max(keep, math.ceil(len(left) / 2))
            left = sorted(sorted(left, key=margins.__getitem__, reverse=True)[:half])
            n *= 2
    return left, rungs


class _Layer:
    """One layer's programs on the evaluator's pairs and control texts. Layers come in ascending order."""

    def __init__(self, evaluator: ContrastEvaluator, number: int, program_at: ProgramAt) -> None:
        self._evaluator, self._number, self._at = evaluator, number, partial(program_at, number)
        evaluator.advance(self._at(1.0))  # so that each block below is run once for the whole sweep

    def effects(self, coefficients: Sequence[float]) -> np.ndarray:
        return self._evaluator.effects([self._at(c) for c in coefficients])

    def ratio(self, c: float) -> float:
        return self._evaluator.perplexity_ratio(self._at(c))

    def lost(self, c: float) -> float:
        return self._evaluator.lost_answers(self._at(c))

    def within(self, limit: float, coefficients: Sequence[float]) -> list[GridPoint]:
        """Measure the perplexity of the points, each sign in ascending order, up to the first beyond `limit`."""
        points: dict[float, GridPoint] = {}
        for sign in (1.0, -1.0):
            beyond: float | None = None
            for c in sorted((c for c in coefficients if c * sign > 0), key=abs):
                if beyond is not None:
                    reason = f"coefficient {beyond:g} of this layer is beyond the perplexity limit already"
                    points[c] = GridPoint(self._number, c, skipped=reason)
                    continue
                ratio, reason = self.ratio(c), ""
                if not ratio <= limit:  # NaN too
                    beyond = c
                    reason = "perplexity of control text x{}, beyond x{}".format(*decisive(ratio, limit, ".2f"))
                points[c] = GridPoint(self._number, c, perplexity_ratio=ratio, skipped=reason)
        return [points[c] for c in dict.fromkeys(coefficients)]  # in the recipe's order, each once

    def solve(self, target: SolverTarget, start: float) -> GridPoint:
        """The layer's one point, at the coefficient that a solver finds."""
        if target.perplexity_limit is not None:
            words, limit = f"a perplexity of x{target.perplexity_limit:g} on control text", target.perplexity_limit
            c, tried = solve(lambda c: math.log(self.ratio(c)), math.log(limit), below=True, start=start)
        else:
            words, kl = f"KL(steered||base) = {target.kl:g} nats/token", float(target.kl or 0.0)
            c, tried = solve(lambda c: self._evaluator.divergence(self._at(c)), kl, below=False, start=start)
        if c is None:
            reason = f"no coefficient of {len(tried)} up to {tried[-1]:.3g} reaches {words}"
            return GridPoint(self._number, tried[-1], skipped=reason)
        return GridPoint(self._number, c, perplexity_ratio=self.ratio(c), evaluations=len(tried))

    def largest_coherent(self, options: ValidateOptions, near: float) -> list[float]:
        """The largest coefficient of each sign within the perplexity limit, or the solver's; searched from `near` on."""
        if isinstance(options.coefficients, SolverTarget):
            point = self.solve(options.coefficients, near)
            return [] if point.skipped else [point.coefficient]
        limit, largest = options.max_perplexity_ratio, []
        for sign in (1.0, -1.0):
            ordered = sorted((c for c in options.coefficients if c * sign > 0), key=abs)
            largest.append(climb(lambda c: self.ratio(c) <= limit, ordered, sign * near) if ordered else None)
        return [c for c in largest if c is not None]
