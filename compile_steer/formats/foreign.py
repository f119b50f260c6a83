"""What a file of another tool comes to: a vector a block, to be added as it is with coefficient 1."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.sites import Point

# What a number k in a file means. block: the output of block k. hidden_state: transformers' hidden_states[k], which
# is the input of block k, so the output of block k - 1; 0 is the embeddings.
LayerConvention = Literal["block", "hidden_state"]


@dataclass(frozen=True)
class Given:
    """What the recipe says that a file cannot, and the size of the model that the vectors are for.

    `controls` is how many other vectors of the same file are wanted, where it has any, chosen by `generator`.
    """

    n_layers: int
    d_model: int
    controls: int
    generator: torch.Generator
    layer_convention: LayerConvention | None = None
    layer: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class Foreign:
    """`vectors`, block -> [d_model] fp32 at `point`, in the activations' units; a block of zeros has none.

    `others` [n, d_model] are of the same kind, for the one block that the file is of. `embeddings`: the file has a
    vector for the input of block 0 too, which no block's output is. `made_for` is the model's type, if the file says.
    """

    vectors: Mapping[int, Tensor]
    point: Point = "resid_post"
    others: Tensor | None = None
    embeddings: bool = False
    made_for: str = ""


NUMBER = r"(0|[1-9]\d{0,4})"  # of a block, in a file's own names


def placed(
    path: Path, keyed: Mapping[int, Tensor], convention: LayerConvention | None, named: str, meanings: str, hint: str
) -> Foreign:
    """`keyed` vectors at the blocks that the convention says.

    Args:
        named: how the file writes number k, with {} for it.
        meanings: which tools write which convention.
        hint: the model's type, if the file says.

    Raises:
        ArtifactError: no convention was given.
    """
    if convention is None:
        first, last = named.format(min(keyed)), named.format(max(keyed))
        raise ArtifactError(
            f"{path} has {first}{f' to {last}' if first != last else ''}{f' for {hint!r}' if hint else ''}, and cannot "
            "tell which blocks these are. Set extract.imported.layer_convention (--layer-convention) to block, where "
            f"{named.format('k')} is of the output of block k, or to hidden_state, where it is of hidden_states[k], the "
            f"output of block k-1. {meanings}"
        )
    if convention == "block":
        return Foreign(keyed, made_for=hint)
    inner = {k - 1: vector for k, vector in keyed.items() if k > 0}
    return Foreign(inner, embeddings=bool(keyed.get(0, torch.zeros(1)).any()), made_for=hint)


def require_fit(path: Path, foreign: Foreign, n_layers: int, d_model: int) -> None:
    """Raise `ArtifactError` with every reason why these vectors are not of a model of that size."""
    problems = []
    shapes = {tuple(vector.shape) for vector in foreign.vectors.values()} - {(d_model,)}
    if shapes:
        found = ", ".join(str(list(shape)) for shape in sorted(shapes))
        hint = f" (it was made for '{foreign.made_for}')" if foreign.made_for else ""
        problems.append(f"{path}: vectors of shape {found}; the model is {d_model} wide{hint}.")
    outside = sorted(layer for layer in foreign.vectors if not 0 <= layer < n_layers)
    if outside:
        problems.append(
            f"{path} is of blocks {', '.join(map(str, outside))} too; the model has {n_layers}, counted from 0."
        )
    if not all(bool(torch.isfinite(vector).all()) for vector in foreign.vectors.values()):
        problems.append(f"{path} holds NaN or infinity.")
    elif not any(bool(vector.any()) for vector in foreign.vectors.values()):
        problems.append(f"{path}: every vector is 0; it steers nothing.")
    if problems:
        raise ArtifactError([*problems, "Use a vector of this very model."])


def other_rows(path: Path, size: int, given: Given) -> list[int]:
    """Numbers of `given.controls` rows other than `given.index`, of `size`; raises `ArtifactError` where there are fewer."""
    if given.index is None or not given.controls < size or given.index >= size:
        raise ArtifactError(
            f"{path} has {size} rows, counted from 0; needed are extract.imported.index (--index; found {given.index}) and "
            f"{given.controls} others as controls (extract.shuffled)."
        )
    near = torch.randperm(size - 1, generator=given.generator)[: given.controls].tolist()
    return [row + (row >= given.index) for row in near]


def read_json(path: Path, needed: str) -> dict[str, Any]:
    """One JSON object; raises `ArtifactError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ArtifactError(f"{path} cannot be read as JSON ({reason}); needed: {needed}.") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is {type(content).__name__}; needed: {needed}.")
    return content


def numbers(path: Path, name: str, values: object) -> Tensor:
    """A JSON list of numbers as [n] fp32; raises `ArtifactError`."""
    problem = ArtifactError(f"{path}: {name} must be a list of numbers.")
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise problem
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64).float()
    except OverflowError as error:  # JSON has integers of any size
        raise problem from error
