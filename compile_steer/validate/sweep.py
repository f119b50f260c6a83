"""Layer x coefficient on validation data: which cell is worth a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compile_steer.answers import Request, answer
from compile_steer.behaviour import Behaviour
from compile_steer.contrast import contrast_scores, encode_pairs
from compile_steer.directions import Directions
from compile_steer.errors import LayoutError, RecipeError
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.progress import Meter
from compile_steer.settings import Validate
from compile_steer.tokens import encode
from compile_steer.validate.report import Cell
from compile_steer.validate.shared import SharedPrefix

MakeProgram = Callable[[int, float], Program]


@dataclass(frozen=True)
class Sweep:
    """Every cell, the chosen one, and per-pair effects of the chosen layer by coefficient."""

    cells: list[Cell]
    best: Cell
    effects: dict[float, np.ndarray]

    @property
    def slopes(self) -> np.ndarray:
        """Steerability of each pair (Tan et al. 2407.12404): the slope of its effect over the coefficient,
        by least squares through the origin, where the effect is 0 by definition."""
        coefficients = np.array(list(self.effects))
        effects = np.stack(list(self.effects.values()))
        slopes: np.ndarray = coefficients @ effects / (coefficients @ coefficients)
        return slopes


def choose_layers(options: Validate, n_layers: int) -> list[int]:
    """The recipe's layers, or for 'auto' five from 30 % to 70 % of the depth; raises `LayoutError`."""
    if options.layers == "auto":
        return sorted({round(n_layers * share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)} - {n_layers})
    missing = [layer for layer in options.layers if isinstance(layer, int) and layer >= n_layers]
    if missing:
        raise LayoutError(
            f"validate.layers: {', '.join(map(str, missing))} not in this model, which has blocks 0 to {n_layers - 1}. "
            "Name other layers, or 'auto'."
        )
    return sorted(set(map(int, options.layers)))


def with_directions(options: Validate, directions: Directions) -> Validate:
    """The options, their layers among those that have a direction (a feature has one); raises `RecipeError`."""
    available = set(directions.layers)
    if directions.joint or len(available) == len(directions.vectors):
        return options
    layers = choose_layers(options, len(directions.vectors))
    missing = [layer for layer in layers if layer not in available]
    if missing and options.layers != "auto":
        raise RecipeError(
            f"validate.layers: {', '.join(map(str, missing))} without a direction; there is one for "
            f"{', '.join(map(str, sorted(available)))}. Name these, or 'auto'."
        )
    return options.model_copy(update={"layers": tuple(available.intersection(layers) or sorted(available))})


def sweep(loaded: Loaded, behaviour: Behaviour, options: Validate, make: MakeProgram, meter: Meter) -> Sweep:
    """Measure every cell by contrast and neutral perplexity, the best layers by generation, and choose.

    Chosen is the coherent cell with the highest generation score; the contrast decides between equals.
    """
    layers = choose_layers(options, loaded.layout.n_layers)
    n_pairs = min(options.sweep_pairs, len(behaviour.validation))
    cells: list[Cell] = []
    effects: dict[tuple[int, float], np.ndarray] = {}
    texts = encode_pairs(loaded, behaviour.validation[:n_pairs])
    neutral = [encode(loaded.tokenizer, text) for text in behaviour.neutral[: options.sweep_neutral]]
    shared = SharedPrefix(loaded, texts + neutral)
    base = shared.base()
    with meter.phase("sweep: log-probability contrast", len(layers) * len(options.coefficients)) as tick:
        for layer in layers:
            shared.advance(make(layer, 1.0).first_layer)
            for coefficient in options.coefficients:
                change = shared.under(make(layer, coefficient)) - base
                effect = contrast_scores(change[: 2 * n_pairs])
                effects[layer, coefficient] = effect
                ratio = float(np.exp(-change[2 * n_pairs :].mean()))
                cells.append(Cell(layer, coefficient, float(effect.mean()), ratio))
                tick(1)
    cells = _answer_best_layers(loaded, behaviour, options, make, cells, meter)
    best = _choose(cells, options)
    return Sweep(cells, best, {c: effects[best.layer, c] for c in options.coefficients})


def _answer_best_layers(
    loaded: Loaded, behaviour: Behaviour, options: Validate, make: MakeProgram, cells: Sequence[Cell], meter: Meter
) -> list[Cell]:
    """Add the generation score to the coherent cells of the layers with the strongest contrast."""
    coherent = [cell for cell in cells if cell.perplexity_ratio <= options.max_perplexity_ratio]
    strongest: dict[int, float] = {}
    for cell in coherent:
        strongest[cell.layer] = max(cell.contrast, strongest.get(cell.layer, -np.inf))
    layers = sorted(strongest, key=lambda layer: -strongest[layer])[: options.sweep_layers]
    prompts = [pair.prompt for pair in behaviour.validation[: options.sweep_prompts]]
    answered: dict[tuple[int, float], Cell] = {}
    score = options.score.bind(loaded, behaviour)
    with meter.phase("sweep: answers of the best layers", len(layers)) as tick:
        for layer in layers:
            mine = [cell for cell in coherent if cell.layer == layer]
            requests = [Request(prompts, make(layer, cell.coefficient)) for cell in mine]
            found = answer(loaded, requests, score, options.max_new_tokens, behaviour.questions)
            for cell, one in zip(mine, found, strict=True):
                answered[layer, cell.coefficient] = replace(
                    cell, score=float(one.scores.mean()), repetition=float(one.repetition.mean())
                )
            tick(1)
    return [answered.get((cell.layer, cell.coefficient), cell) for cell in cells]


def _choose(cells: Sequence[Cell], options: Validate) -> Cell:
    coherent = [cell for cell in cells if cell.repetition is not None and cell.repetition <= options.max_repetition]
    if not coherent:
        least = min(cells, key=lambda cell: cell.perplexity_ratio)
        raise RecipeError(
            f"validate: no cell of the sweep is coherent. The mildest (layer {least.layer}, coefficient "
            f"{least.coefficient:g}) makes neutral text {least.perplexity_ratio:.2f}x as perplexing and repeats "
            f"{'too much' if least.repetition is None else format(least.repetition, '.2f')}; allowed are "
            f"{options.max_perplexity_ratio:g}x and {options.max_repetition:g}. Try smaller coefficients."
        )
    return max(coherent, key=lambda cell: (cell.score or 0.0, cell.contrast))
