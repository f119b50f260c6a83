"""Bare tensors of `torch.save`: CAA and EasyEdit2, persona vectors, hidden-directions and hotwire, AxBench."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import Foreign, Given, other_rows
from compile_steer.formats.pickles import load_plain


def named_layer(path: Path) -> int | None:
    """The block in `vec_layer_14_MODEL.pt` (CAA) or `layer_14.pt` (EasyEdit2)."""
    found = re.search(r"(?:^|_)layer_(\d+)(?:_|$)", path.stem)
    return None if found is None else int(found[1])


def read_one(path: Path, given: Given) -> Foreign:
    """[d_model] for the output of the block that the name or the recipe says; raises `ArtifactError`."""
    vector = _floats(path)
    named = named_layer(path)
    if given.layer is not None and named not in (None, given.layer):
        raise ArtifactError(
            f"{path} is named for block {named}, but extract.imported.layer (--layer) is {given.layer}."
        )
    layer = named if given.layer is None else given.layer
    if layer is None:
        raise ArtifactError(
            f"{path} does not say its block. Set extract.imported.layer (--layer), or name the file layer_K.pt."
        )
    if vector.ndim != 1:
        raise ArtifactError(_another_shape(path, vector, given, "[d_model]"))
    return Foreign({layer: vector.float()})


def read_states(path: Path, given: Given) -> Foreign:
    """Persona vectors [n_layers + 1, d_model]: row r is of hidden_states[r], row 0 the embeddings'; raises `ArtifactError`.

    The last row was read behind the model's final norm, as transformers gives it.
    """
    rows = _rows(path, given, given.n_layers + 1)
    return Foreign({row - 1: rows[row].float() for row in range(1, len(rows))}, embeddings=bool(rows[0].any()))


def read_blocks(path: Path, given: Given) -> Foreign:
    """hidden-directions and hotwire [n_layers, d_model]: row k is of the output of block k; raises `ArtifactError`."""
    rows = _rows(path, given, given.n_layers)
    return Foreign({layer: rows[layer].float() for layer in range(len(rows))})


def read_concept(path: Path, given: Given) -> Foreign:
    """One row of AxBench's [n_concepts, d_model], for the output of a block; the others are controls.

    Raises:
        ArtifactError: the block or the row is not said, or the tensor is something else.
    """
    rows = _floats(path)
    if rows.ndim != 2:
        raise ArtifactError(_another_shape(path, rows, given, "[n_concepts, d_model]"))
    others = rows[other_rows(path, len(rows), given)].float()
    if given.layer is None or given.index is None:
        raise ArtifactError(f"{path} does not say its block. Set extract.imported.layer (--layer).")
    return Foreign({given.layer: rows[given.index].float()}, others=others)


def _rows(path: Path, given: Given, needed: int) -> Tensor:
    found = _floats(path)
    if found.ndim != 2 or len(found) != needed:
        raise ArtifactError(_another_shape(path, found, given, f"[{needed}, d_model]"))
    return found


def _floats(path: Path) -> Tensor:
    found = load_plain(path)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.layout != torch.strided:
        what = f"{found.layout} {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ArtifactError(
            f"{path} holds {what}; needed: one tensor of floats. Save vectors by block as a safetensors file whose tensors "
            "are named resid_post.K."
        )
    return found.detach()  # a parameter is a tensor too


def _another_shape(path: Path, found: Tensor, given: Given, needed: str) -> str:
    return (
        f"{path} has shape {list(found.shape)}; this format needs {needed}. For this model of {given.n_layers} blocks "
        f"extract.imported.format (--format) is caa for [{given.d_model}], hidden_directions for [{given.n_layers}, "
        f"{given.d_model}], persona for [{given.n_layers + 1}, {given.d_model}], axbench for any other rows."
    )
