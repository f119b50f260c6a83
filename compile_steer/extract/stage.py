"""The stage: training pairs -> directions of every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compile_steer.activations import read_activations
from compile_steer.behaviour import Behaviour, Pair
from compile_steer.directions import Directions, Source
from compile_steer.errors import RecipeError
from compile_steer.extract.from_pairs import fit, shuffled_directions
from compile_steer.extract.sibling import load_sibling
from compile_steer.extract.trained import trained_directions
from compile_steer.models import Loaded
from compile_steer.progress import Meter
from compile_steer.recipe import Recipe
from compile_steer.settings import Extract


def extract(recipe: Recipe, loaded: Loaded, behaviour: Behaviour, inputs: str, meter: Meter) -> Directions:
    """Find a direction at every block, on the recipe's model or on the sibling that it names.

    Raises:
        RecipeError: too few pairs, pairs whose sides are the same tokens at the read-out, or a training that failed.
        LayoutError: NaN activations, or a sibling of another shape.
    """
    if recipe.extract.model is None:
        return _extract(recipe, loaded, behaviour, inputs, meter)
    sibling = load_sibling(recipe.extract.model, loaded, recipe.dtype)
    found = _extract(recipe, sibling, behaviour, inputs, meter)
    source = Source(sibling.id, sibling.revision)
    return replace(found, model=loaded.id, revision=loaded.revision, source=source)


def _extract(recipe: Recipe, loaded: Loaded, behaviour: Behaviour, inputs: str, meter: Meter) -> Directions:
    """Read both sides of the training pairs once and fit a direction at every block, or train one."""
    options = recipe.extract
    pairs = behaviour.train[: options.pairs]
    if options.pairs is not None and len(behaviour.train) < options.pairs:
        raise RecipeError(f"extract.pairs: {options.pairs} wanted, but data.train has {len(behaviour.train)}.")
    if options.method == "trained":
        return trained_directions(recipe, loaded, pairs, inputs, meter)
    _require_contrast(pairs, options)
    with meter.phase("reading activations of all blocks", 2 * len(pairs)) as tick:
        positive, negative = (
            read_activations(loaded, side, point=options.point, readout=options.readout, tick=tick)
            for side in ([p.positive for p in pairs], [p.negative for p in pairs])
        )
    vectors = fit(positive, negative, options.method)
    if float(vectors.norm(dim=-1).max()) == 0.0:
        raise RecipeError("the two sides of the pairs have equal activations; there is no direction between them.")
    return Directions(
        vectors,
        shuffled_directions(positive, negative, options.method, options.shuffled, recipe.seed),
        loaded.id,
        loaded.revision,
        options.point,
        inputs,
    )


def _require_contrast(pairs: Sequence[Pair], options: Extract) -> None:
    if options.readout == "last_prompt":
        same = sum(p.positive.prompt == p.negative.prompt for p in pairs)
        if same:
            raise RecipeError(
                f"extract.readout last_prompt: {same} of {len(pairs)} pairs ask the same prompt on both sides, so the "
                "prompt's last token cannot tell them apart. Set data.positive_template (for example "
                "'{prompt} Answer in lowercase.'), or read out response_mean."
            )
