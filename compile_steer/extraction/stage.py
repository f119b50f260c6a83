"""The stage: training data, or another tool's file -> directions of every block."""

from __future__ import annotations

from dataclasses import replace

import torch

from compile_steer.common.distributed import require_alone
from compile_steer.common.errors import ArtifactError, LayoutError, RecipeError
from compile_steer.data.behaviour import Context
from compile_steer.extraction.choices import from_choices
from compile_steer.extraction.options import ExtractOptions
from compile_steer.extraction.pair_methods import ExtractedDirections, from_pairs
from compile_steer.extraction.trained import trained_directions
from compile_steer.formats.foreign import ImportOptions, read_vectors
from compile_steer.models.forward import median_norms
from compile_steer.models.load import LoadedModel, load
from compile_steer.steering.directions import Directions, Source, as_long_as
from compile_steer.steering.layout import Layout
from compile_steer.steering.sites import Point


def extract(context: Context, options: ExtractOptions, *, positions: str = "all") -> Directions:
    """Find a direction for every block by the chosen method, with its controls.

    Args:
        options: an imported file's path must be absolute, or relative to the working directory (see
            `ExtractOptions.located`).
        positions: the tokens at which trained vectors act while they are trained ('all', 'prompt', 'response',
            'last_prompt', or several joined by '+').

    Returns:
        The directions, for the model of the `context`. Their `inputs` are empty.

    Raises:
        RecipeError: too few pairs or questions, pairs with the same tokens on both sides, questions that the model
            answers all right or all wrong, or a training that failed.
        ArtifactError: an imported file is missing, damaged, unsafe, or of another width or depth.
        LayoutError: NaN activations, or another model (`options.model`) of another shape.
    """
    model, target, point, source = context.model, context.model, options.point, None
    if options.model is not None:
        model = load_sibling(options.model, target)
        context, source = replace(context, model=model), Source(model.id, model.revision)
    match options.method:
        case "trained":
            require_alone("extract.method trained")
            trained = trained_directions(context, options, positions)
            return replace(trained, model=target.id, revision=target.revision, source=source)
        case "imported":
            point, extracted = read_imported(options, model.layout, context.seed)
        case "pasf" | "ipasa" | "ipaswo" as method:
            extracted = from_choices(context, options, method)
        case _ as method:
            extracted = from_pairs(context, options, method)
    # A single block may have no direction (equal embeddings below), but not all of them.
    if float(extracted.vectors.norm(dim=-1).max()) == 0.0:
        raise RecipeError("the two sides of the data have equal activations; there is no direction between them.")
    if options.length == "unit":
        extracted = extracted.resized(torch.ones(model.layout.n_layers))
    elif options.length == "stream":
        extracted = extracted.resized(median_norms(model, context.data.neutral, point))
    return Directions(
        extracted.vectors,
        extracted.shuffled,
        target.id,
        target.revision,
        point,
        inputs="",
        operation=options.operation,
        # A clamp sets the projection that the positive side has.
        projections=extracted.projections() if options.operation == "clamp" else None,
        joint=options.imported.joint is not None,
        controls=extracted.controls,
        source=source,
    )


def load_sibling(reference: str, target: LoadedModel) -> LoadedModel:
    """Load another model to take directions from, for example the instruction-tuned sibling of a base model.

    Vectors of Gemma-2's instruction-tuned models steer its base models (Stolfo et al. 2410.12877, section 6): the two
    share the residual stream, so a model of another shape or tokenizer is a `LayoutError`. It reads the data through
    its own chat template.
    """
    # Read in the target's own precision, so that the two streams round alike.
    dtype = str(target.model.dtype).removeprefix("torch.")
    sibling = load(reference, device=str(target.device), dtype=dtype, chat=target.chat)
    sizes = {"blocks": "n_layers", "dimensions of the stream": "d_model"}
    problems = [
        f"extract.model '{reference}' has {actual} {name}; '{target.id}' has {needed}."
        for name, size in sizes.items()
        if (actual := getattr(sibling.layout, size)) != (needed := getattr(target.layout, size))
    ]
    different = set(target.tokenizer.get_vocab().items()) ^ set(sibling.tokenizer.get_vocab().items())
    if different:
        problems.append(
            f"extract.model '{reference}' has another tokenizer than '{target.id}' ({len(different)} entries differ)."
        )
    if problems:
        raise LayoutError([*problems, "A direction means the same only in two trainings of one base model."])
    return sibling


def read_imported(options: ExtractOptions, layout: Layout, seed: int) -> tuple[Point, ExtractedDirections]:
    """Read the vectors of another tool's file: the point that the file names, and the vectors with their own length.

    A coefficient of 1 adds a vector as it is. The controls are other rows of the same file if it has any; otherwise the
    vectors' coordinates in another order. Raises `ArtifactError` for a file that `read_vectors` refuses.
    """
    imported, size, generator = options.imported, (layout.n_layers, layout.d_model), torch.Generator().manual_seed(seed)
    assert imported.file is not None, "ExtractOptions refuses method imported without a file"
    needed = ImportOptions(
        *size, options.shuffled, generator, imported.layer_convention, imported.layer, imported.index
    )
    foreign = read_vectors(imported.file, imported.format, needed)
    vectors = torch.zeros(size)
    for layer, vector in foreign.vectors.items():
        vectors[layer] = vector
    if imported.joint == "all" and foreign.embeddings:
        raise ArtifactError(
            f"{imported.file} has a vector for the embeddings too, which is at no block's output. Name the blocks to use "
            "in extract.imported.joint (--joint)."
        )
    if isinstance(imported.joint, tuple):
        present = vectors.norm(dim=-1).nonzero()[:, 0].tolist()
        missing = sorted(set(imported.joint) - set(present))
        if missing:
            raise ArtifactError(
                f"{imported.file} has no vector for {', '.join(map(str, missing))} of extract.imported.joint (--joint); "
                f"it has one for blocks {', '.join(map(str, present))}."
            )
        vectors[[layer for layer in range(layout.n_layers) if layer not in imported.joint]] = 0.0
    if foreign.others is not None:
        # A row is of the same kind as the vector but not of its length, and a control must be as long.
        controls = as_long_as(foreign.others.unsqueeze(1).expand(-1, layout.n_layers, -1), vectors)
        return foreign.point, ExtractedDirections(vectors, controls, controls="from other rows of its file")
    # One order for all blocks, so that what a vector shares across blocks is shared by its control.
    orders = [torch.randperm(layout.d_model, generator=generator) for _ in range(options.shuffled)]
    shuffled = torch.stack([vectors[:, order] for order in orders])
    return foreign.point, ExtractedDirections(vectors, shuffled, controls="from its own numbers in another order")
