"""The stage: training data -> directions of every block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from compile_steer.artifacts.files import sha256
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.extract import choices, imported
from compile_steer.extract.found import Found
from compile_steer.extract.options import ChoiceMethod, Extract, PairMethod
from compile_steer.extract.pairs import find
from compile_steer.extract.sibling import load_sibling
from compile_steer.extract.trained import trained_directions
from compile_steer.models.forward import median_norms, read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.recipe import Recipe
from compile_steer.steering.directions import Directions, Source
from compile_steer.steering.sites import Point


def extract(recipe: Recipe, loaded: LoadedModel, behaviour: Behaviour, inputs: str, progress: Progress) -> Directions:
    """Find directions by the recipe's method, on the recipe's model or on the sibling that it names.

    Raises:
        RecipeError: too few pairs or questions, pairs whose sides are the same tokens at the read-out, questions
            that the model gets all right or all wrong, or a training that failed.
        ArtifactError: an imported file is not there, damaged, unsafe, or of another width or depth.
        LayoutError: NaN activations, or a sibling of another shape.
    """
    if recipe.extract.model is None:
        return _extract(recipe, loaded, behaviour, inputs, progress)
    sibling = load_sibling(recipe.extract.model, loaded, recipe.dtype)
    found = _extract(recipe, sibling, behaviour, inputs, progress)
    source = Source(sibling.id, sibling.revision)
    return replace(found, model=loaded.id, revision=loaded.revision, source=source)


def _extract(recipe: Recipe, loaded: LoadedModel, behaviour: Behaviour, inputs: str, progress: Progress) -> Directions:
    """Find a direction at every block, at the length and for the operation that the recipe names."""
    options = recipe.extract
    if options.method == "trained":
        _require_count(options, len(behaviour.train), "pairs")
        return trained_directions(recipe, loaded, behaviour.train[: options.pairs], inputs, progress)
    point: Point = options.point
    match options.method:
        case "imported":
            point, found = imported.read(source_path(recipe), options, loaded.layout, recipe.seed)
        case "pasf" | "ipasa" | "ipaswo" as method:
            found = _from_choices(loaded, behaviour, options, method, recipe.seed, progress)
        case _ as method:
            found = _from_pairs(loaded, behaviour, options, method, recipe.seed, progress)
    if float(found.vectors.norm(dim=-1).max()) == 0.0:
        raise RecipeError("the two sides of the data have equal activations; there is no direction between them.")
    length = _length(loaded, behaviour, options, point)
    if length is not None:
        found = found.resized(length)
    projections = found.projections() if options.operation == "clamp" else None
    return Directions(
        found.vectors,
        found.shuffled,
        loaded.id,
        loaded.revision,
        point,
        inputs,
        options.operation,
        projections,
        joint=options.imported.joint is not None,
        controls=found.controls,
    )


def source_path(recipe: Recipe) -> Path:
    """Where the file that directions are imported from lies."""
    return Path(os.path.normpath(recipe.folder / (recipe.extract.imported.file or "")))


def source(recipe: Recipe) -> str:
    """Hash of the file that the directions are read from, empty where they are made from the data alone."""
    path = source_path(recipe)
    return sha256(path) if recipe.extract.method == "imported" and path.exists() else ""


def _length(loaded: LoadedModel, behaviour: Behaviour, options: Extract, point: Point) -> Tensor | None:
    """[L] lengths that the recipe wants; None: the method's own."""
    if options.length == "own":
        return None
    norms = median_norms(loaded, behaviour.neutral, point)
    return norms if options.length == "stream" else norms.new_ones(norms.shape)


def _read_at(options: Extract) -> Point:
    """The output of the block before stands in for a block's own in the published code of PAS."""
    return "resid_pre" if options.off_by_one else options.point


def _from_choices(
    loaded: LoadedModel, behaviour: Behaviour, options: Extract, method: ChoiceMethod, seed: int, progress: Progress
) -> Found:
    prompts = list(dict.fromkeys(pair.prompt for pair in behaviour.train))
    questions = [behaviour.questions[prompt] for prompt in prompts if prompt in behaviour.questions]
    _require_count(options, len(questions), "questions")
    questions = questions[: options.pairs]
    choices.require_questions(questions, method)
    total = sum(len(question.letters) for question in questions)
    with progress.phase("reading activations of all answers", total) as advance:
        items = choices.read_items(loaded, questions, _read_at(options), advance)
    return choices.fit(items, method, options.shuffled, seed)


def _from_pairs(
    loaded: LoadedModel, behaviour: Behaviour, options: Extract, method: PairMethod, seed: int, progress: Progress
) -> Found:
    """Both sides of the training pairs, read once."""
    _require_count(options, len(behaviour.train), "pairs")
    pairs = behaviour.train[: options.pairs]
    _require_contrast(pairs, options)
    with progress.phase("reading activations of all blocks", 2 * len(pairs)) as advance:
        positive, negative = (
            read_activations(
                loaded, _read(side, options), point=_read_at(options), readout=options.readout, advance=advance
            )
            for side in ([p.positive for p in pairs], [p.negative for p in pairs])
        )
    return find(positive, negative, method, options.shuffled, seed)


def _read(side: Sequence[Text], options: Extract) -> Sequence[Text]:
    """Without the responses where nothing of them is read."""
    return [replace(text, response="") for text in side] if options.readout == "last_prompt" else side


def _require_count(options: Extract, found: int, what: str) -> None:
    if options.pairs is not None and found < options.pairs:
        raise RecipeError(f"extract.pairs: {options.pairs} wanted, but data.train has {found} {what}.")


def _require_contrast(pairs: Sequence[Pair], options: Extract) -> None:
    if options.readout == "last_prompt":
        same = sum(p.positive.prompt == p.negative.prompt for p in pairs)
        if same:
            raise RecipeError(
                f"extract.readout last_prompt: {same} of {len(pairs)} pairs ask the same prompt on both sides, so the "
                "prompt's last token cannot tell them apart. Set data.positive_template (for example "
                "'{prompt} Answer in lowercase.'), or read out response_mean."
            )
