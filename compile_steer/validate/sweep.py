"""Layer x coefficient on validation data: which cell is worth a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compile_steer.common.errors import LayoutError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score
from compile_steer.stats import false_discovery_rates, sign_flip
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.program import Program
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.options import Target, Validate
from compile_steer.validate.report import GridPoint, block_name
from compile_steer.validate.search import Rung, climb, halve, solve

MakeProgram = Callable[[int, float], Program]

# A layer's larger coefficients are left out once one is beyond the ceiling by this factor.
STOP_MARGIN = 1.1
_FIRST_PAIRS = 4
_LAST_LAYERS = 4


@dataclass(frozen=True)
class Sweep:
    """Every cell, the chosen one, per-pair effects of the chosen layer by coefficient, and the layer search."""

    cells: list[GridPoint]
    best: GridPoint
    effects: dict[float, np.ndarray]
    rungs: list[Rung]

    @property
    def slopes(self) -> np.ndarray:
        """Steerability of each pair (Tan et al. 2407.12404): the slope of its effect over the coefficient,
        by least squares through the origin, where the effect is 0 by definition."""
        coefficients = np.array(list(self.effects))
        effects = np.stack(list(self.effects.values()))
        slopes: np.ndarray = coefficients @ effects / (coefficients @ coefficients)
        return slopes


def choose_layers(options: Validate, n_layers: int) -> list[int]:
    """The recipe's layers; for 'auto' five from 30 % to 70 % of the depth, for 'search' all; raises `LayoutError`."""
    if options.layers == "search":
        return list(range(n_layers))
    if options.layers == "auto":
        return sorted({round(n_layers * share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)} - {n_layers})
    missing = [layer for layer in options.layers if isinstance(layer, int) and layer >= n_layers]
    if missing:
        raise LayoutError(
            f"validate.layers: {', '.join(map(str, missing))} not in this model, which has blocks 0 to {n_layers - 1}. "
            "Name other layers, or 'auto'."
        )
    return sorted(set(map(int, options.layers)))


def candidates(options: Validate, directions: Directions) -> list[int]:
    """The layers to try: the recipe's that have a direction, or `EVERY_BLOCK` where one program holds all.

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
    found = [layer for layer in layers if layer in available]
    if isinstance(options.layers, str):
        found = found or list(available)  # an imported file may be of one layer, which lies elsewhere
    elif available and len(found) < len(layers):
        missing = ", ".join(str(layer) for layer in layers if layer not in available)
        raise RecipeError(
            f"validate.layers: {missing} without a direction; there is one for {', '.join(map(str, available))}. Name "
            "these, or 'auto'."
        )
    if not found:
        raise RecipeError(
            f"validate.layers: the directions of blocks {', '.join(map(str, layers))} are all 0. Name later blocks."
        )
    return found


def sweep(
    loaded: LoadedModel,
    behaviour: Behaviour,
    options: Validate,
    layers: Sequence[int],
    make: MakeProgram,
    bench: Bench,
    score: Score,
    seed: int,
    progress: Progress,
) -> Sweep:
    """Measure every cell by contrast and neutral perplexity, the best layers by generation, and choose.

    Chosen is the coherent cell with the highest generation score; the contrast decides between equals.

    Args:
        bench: the sweep's validation pairs and neutral texts.
    """
    rungs: list[Rung] = []
    if options.layers == "search":
        layers, rungs = search_layers(loaded, behaviour, options, layers, make, progress)
    cells, effects = measure_layers(bench, options, layers, make, progress)
    cells = _corrected(cells, effects, seed)
    cells = _answer_best_layers(loaded, behaviour, options, make, cells, score, progress)
    best = _choose(cells, options)
    mine = {c: found for (layer, c), found in effects.items() if layer == best.layer}
    return Sweep(cells, best, mine, rungs)


def measure_layers(
    bench: Bench,
    options: Validate,
    layers: Sequence[int],
    make: MakeProgram,
    progress: Progress,
    margin: float = STOP_MARGIN,
) -> tuple[list[GridPoint], dict[tuple[int, float], np.ndarray]]:
    """The cells of every layer, and the effects [n_pairs] of those that were measured; skipped ones say why."""
    cells: list[GridPoint] = []
    effects: dict[tuple[int, float], np.ndarray] = {}
    start = 1.0
    with progress.phase("sweep: log-probability contrast", len(layers)) as advance:
        for layer in layers:
            bench.advance(make(layer, 1.0))
            if isinstance(options.coefficients, Target):
                mine = [_solved(bench, options.coefficients, layer, make, start)]
                start = mine[0].coefficient if not mine[0].skipped else start
            else:
                mine = graded(bench, options.coefficients, layer, make, options.max_perplexity_ratio * margin)
            kept = [cell for cell in mine if not cell.skipped]
            found = bench.effects([make(layer, cell.coefficient) for cell in kept])
            by = {cell.coefficient: row for cell, row in zip(kept, found, strict=True)}
            effects |= {(layer, c): row for c, row in by.items()}
            cells += [
                cell if cell.skipped else replace(cell, margin=float(by[cell.coefficient].mean())) for cell in mine
            ]
            advance(1)
    return cells, effects


def graded(
    bench: Bench, coefficients: Sequence[float], layer: int, make: MakeProgram, ceiling: float
) -> list[GridPoint]:
    """A layer's cells with their neutral perplexity, each sign in the order of size; past `ceiling` none is run."""
    found: dict[float, GridPoint] = {}
    for sign in (1.0, -1.0):
        beyond: GridPoint | None = None
        for c in sorted((c for c in coefficients if c * sign > 0), key=abs):
            if beyond is not None:
                reason = f"coefficient {beyond.coefficient:g} of this layer is beyond the ceiling already"
                found[c] = GridPoint(layer, c, skipped=reason)
                continue
            ratio = bench.perplexity_ratio(make(layer, c))
            found[c] = GridPoint(layer, c, perplexity_ratio=ratio)
            if not ratio <= ceiling:
                found[c] = beyond = replace(found[c], skipped=f"neutral perplexity x{ratio:.2f}, beyond x{ceiling:.2f}")
    return [found[c] for c in dict.fromkeys(coefficients)]


def _solved(bench: Bench, target: Target, layer: int, make: MakeProgram, start: float) -> GridPoint:
    """The layer's one cell, at the coefficient that a solver finds."""

    def log_ratio(c: float) -> float:
        return math.log(bench.perplexity_ratio(make(layer, c)))

    if target.ceiling is not None:
        wanted, words = math.log(target.ceiling), f"a neutral perplexity of x{target.ceiling:g}"
        found = solve(log_ratio, wanted, below=True, start=start)
    else:
        wanted, words = float(target.kl or 0.0), f"KL(steered||base) = {target.kl:g} nats/token"
        found = solve(lambda c: bench.divergence(make(layer, c)), wanted, below=False, start=start)
    tried = len(found.evaluations)
    if found.coefficient is None:
        largest = max(found.evaluations)
        return GridPoint(layer, largest, skipped=f"no coefficient of {tried} up to {largest:.3g} reaches {words}")
    ratio = bench.perplexity_ratio(make(layer, found.coefficient))
    return GridPoint(layer, found.coefficient, perplexity_ratio=ratio, evaluations=tried)


def search_layers(
    loaded: LoadedModel,
    behaviour: Behaviour,
    options: Validate,
    layers: Sequence[int],
    make: MakeProgram,
    progress: Progress,
) -> tuple[list[int], list[Rung]]:
    """Successive halving of `layers` by the contrast at each layer's largest coherent coefficient."""
    most = min(options.sweep_pairs, len(behaviour.validation))
    keep = max(_LAST_LAYERS, options.sweep_layers)
    known: dict[int, float] = {}

    def measure(pairs: int, left: Sequence[int]) -> dict[int, float]:
        neutral = max(_FIRST_PAIRS, round(options.sweep_neutral * pairs / most))
        bench = Bench(loaded, behaviour.validation[:pairs], behaviour.neutral[:neutral])
        found = {}
        near = 1.0
        for layer in left:
            bench.advance(make(layer, 1.0))
            largest = _largest(bench, options, layer, make, known.get(layer, near))
            near = known[layer] = max(map(abs, largest), default=near)
            effects = bench.effects([make(layer, c) for c in largest])
            found[layer] = float(max(effects.mean(axis=1), default=-math.inf))
            advance(1)
        return found

    with progress.phase("sweep: search over all blocks", 2 * len(layers) - keep) as advance:
        return halve(layers, _FIRST_PAIRS, most, keep, measure)


def _largest(bench: Bench, options: Validate, layer: int, make: MakeProgram, near: float) -> list[float]:
    """The largest coherent coefficient of each sign, or the solver's; looked for from the size `near` on."""
    if isinstance(options.coefficients, Target):
        cell = _solved(bench, options.coefficients, layer, make, near)
        return [] if cell.skipped else [cell.coefficient]
    coefficients, found = options.coefficients, []

    def coherent(c: float) -> bool:
        return bench.perplexity_ratio(make(layer, c)) <= options.max_perplexity_ratio

    for sign in (1.0, -1.0):
        mine = sorted((c for c in coefficients if c * sign > 0), key=abs)
        end = climb(coherent, mine, sign * near) if mine else None
        found += [] if end is None else [end]
    return found


def _corrected(cells: Sequence[GridPoint], effects: dict[tuple[int, float], np.ndarray], seed: int) -> list[GridPoint]:
    """Add each measured cell's sign-flip p-value and its q-value over the whole sweep."""
    p_values = {at: sign_flip(found, seed) for at, found in effects.items()}
    q_values = dict(zip(p_values, false_discovery_rates(list(p_values.values())), strict=True))
    return [
        replace(cell, p_value=p_values[at], q_value=q_values[at])
        if (at := (cell.layer, cell.coefficient)) in p_values
        else cell
        for cell in cells
    ]


def _answer_best_layers(
    loaded: LoadedModel,
    behaviour: Behaviour,
    options: Validate,
    make: MakeProgram,
    cells: Sequence[GridPoint],
    score: Score,
    progress: Progress,
) -> list[GridPoint]:
    """Add the generation score to the coherent cells of the layers with the strongest contrast."""
    coherent = [cell for cell in cells if not cell.skipped and _ratio(cell) <= options.max_perplexity_ratio]
    strongest: dict[int, float] = {}
    for cell in coherent:
        strongest[cell.layer] = max(cell.margin or 0.0, strongest.get(cell.layer, -np.inf))
    layers = sorted(strongest, key=lambda layer: -strongest[layer])[: options.sweep_layers]
    prompts = [pair.prompt for pair in behaviour.validation[: options.sweep_prompts]]
    answered: dict[tuple[int, float], GridPoint] = {}
    with progress.phase("sweep: answers of the best layers", len(layers)) as advance:
        for layer in layers:
            mine = [cell for cell in coherent if cell.layer == layer]
            requests = [Request(prompts, make(layer, cell.coefficient)) for cell in mine]
            found: list[Answers] = answer(loaded, requests, score, options.max_new_tokens, behaviour.questions)
            for cell, one in zip(mine, found, strict=True):
                answered[layer, cell.coefficient] = replace(
                    cell, score=float(one.scores.mean()), repetition=float(one.repetition.mean())
                )
            advance(1)
    return [answered.get((cell.layer, cell.coefficient), cell) for cell in cells]


def _ratio(cell: GridPoint) -> float:
    return math.inf if cell.perplexity_ratio is None else cell.perplexity_ratio


def _choose(cells: Sequence[GridPoint], options: Validate) -> GridPoint:
    coherent = [cell for cell in cells if cell.repetition is not None and cell.repetition <= options.max_repetition]
    if coherent:
        return max(coherent, key=lambda cell: (cell.score or 0.0, cell.margin or 0.0))
    least = min(cells, key=_ratio)
    if least.perplexity_ratio is None:
        raise RecipeError(
            f"validate: no layer has a cell to choose: {least.skipped} (layer {block_name(least.layer)})."
        )
    raise RecipeError(
        f"validate: no cell of the sweep is coherent. The mildest (layer {block_name(least.layer)}, coefficient "
        f"{least.coefficient:g}) makes neutral text {least.perplexity_ratio:.2f}x as perplexing and repeats "
        f"{'too much' if least.repetition is None else format(least.repetition, '.2f')}; allowed are "
        f"{options.max_perplexity_ratio:g}x and {options.max_repetition:g}. Try smaller coefficients."
    )
