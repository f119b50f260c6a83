"""Directions that others have found, read from their files; coefficient 1 adds the vector as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.extract.found import Found
from compile_steer.extract.options import Extract
from compile_steer.formats.foreign import ForeignVectors, ImportOptions, read_vectors
from compile_steer.steering.directions import as_long_as
from compile_steer.steering.layout import Layout
from compile_steer.steering.sites import Point


def read(path: Path, options: Extract, layout: Layout, seed: int) -> tuple[Point, Found]:
    """The point that the file names, and its vectors by block, each of its own length; every other block has none.

    Controls are other rows of the same file where it has any, otherwise the vectors' coordinates in another order, the
    same at all blocks.

    Raises:
        ArtifactError: the file is not there, damaged, unsafe, ambiguous, or of another model.
    """
    asked = options.imported
    generator = torch.Generator().manual_seed(seed)
    given = ImportOptions(
        layout.n_layers,
        layout.d_model,
        options.shuffled,
        generator,
        asked.layer_convention,
        asked.layer,
        asked.index,
    )
    foreign = read_vectors(path, asked.format, given)
    vectors = torch.zeros(layout.n_layers, layout.d_model)
    for layer, vector in foreign.vectors.items():
        vectors[layer] = vector
    if asked.joint is not None:
        vectors = _at_once(path, vectors, foreign, asked.joint)
    if foreign.others is not None:
        others = foreign.others.unsqueeze(1).expand(-1, layout.n_layers, -1)
        return foreign.point, Found(vectors, as_long_as(others, vectors), controls="from other rows of its file")
    orders = [torch.randperm(layout.d_model, generator=generator) for _ in range(options.shuffled)]
    shuffled = torch.stack([vectors[:, order] for order in orders])
    return foreign.point, Found(vectors, shuffled, controls="from its own numbers in another order")


def _at_once(path: Path, vectors: Tensor, foreign: ForeignVectors, joint: tuple[int, ...] | Literal["all"]) -> Tensor:
    """The vectors [L, d] of the blocks that one program holds; raises `ArtifactError` where one of them has none."""
    if joint == "all":
        if foreign.embeddings:
            raise ArtifactError(
                f"{path} has a vector for the embeddings too, which is at no block's output. Name the blocks that are "
                "wanted in extract.imported.joint (--joint)."
            )
        return vectors
    has = vectors.norm(dim=-1).nonzero()[:, 0].tolist()
    missing = sorted(set(joint) - set(has))
    if missing:
        raise ArtifactError(
            f"{path} has no vector for {', '.join(map(str, missing))} of extract.imported.joint (--joint); it has one "
            f"for blocks {', '.join(map(str, has))}."
        )
    kept = torch.zeros_like(vectors)
    kept[list(joint)] = vectors[list(joint)]
    return kept
