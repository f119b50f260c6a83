"""Is what changed a direction that was baked into the weights, and which?

A direction leaves one of three traces, and nothing else: biases of writers (it is added), one common direction taken
out of what writers write (it is ablated), or writers that were given rank-1 edits (it is written along where the
input says so). Anything beside these is a change of another kind, and is said to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Program
from compile_steer.tools.audit_tensors import Difference

# Directions of several matrices are one where they are as near as this; rounding to bf16 leaves 0.999 and more.
_SAME = 0.99
# What an ablation of that direction may leave unexplained of the change; as near.
_LEFT = 0.05
# A new bias as small as this beside the largest is the zero that a config flag brings along.
_ZERO = 1e-6


@dataclass(frozen=True)
class Baked:
    """One direction in the weights.

    added: the writers `tensors` of `block` write a constant of that norm more; ablated: all of them write `coefficient`
    of the direction less (1: nothing of it is left); written: a rank-1 edit of one writer, of that norm. `cosine` is
    with the nearest vector of the known program, without sign where the sign is not known.
    """

    kind: Literal["added", "ablated", "written"]
    tensors: list[str]
    block: int | None
    norm: float
    coefficient: float | None = None
    cosine: float | None = None


def find_baked(
    differences: Sequence[Difference], layout: Layout | None, program: Program | None
) -> tuple[list[Baked], str]:
    """The directions that explain the whole change, and why not where they do not."""
    if layout is None:
        return [], "the family is not known, so what writes the stream is not"
    real = [one for one in differences if one.change.norm > _ZERO * max(d.change.norm for d in differences)]
    if not real:
        return [], "no weight was changed"
    embeddings = layout.family.embeddings
    outside = [one for one in real if one.module not in layout.output_projections and one.module not in embeddings]
    if outside:
        return (
            [],
            f"{len(outside)} of {len(real)} changed tensors write nothing to the stream, as {outside[0].change.name}",
        )
    if all(one.vector is not None for one in real):
        return [_added(one, layout, program) for one in real], ""
    wide = [one for one in real if one.change.rank != 1]
    if wide:
        rank = wide[0].change.rank
        return [], f"{len(wide)} of {len(real)} changes have another rank than 1, as {wide[0].change.name} ({rank})"
    ablated = _ablated(real, embeddings, program)
    return ([ablated], "") if ablated is not None else ([_written(one, layout, program) for one in real], "")


def _added(one: Difference, layout: Layout, program: Program | None) -> Baked:
    assert one.vector is not None, "a bias"
    block = layout.output_projections[one.module].layer
    return Baked(
        "added", [one.change.name], block, one.change.norm, cosine=_cosine(one.vector, _vectors(program, block), True)
    )


def _written(one: Difference, layout: Layout, program: Program | None) -> Baked:
    block = layout.output_projections[one.module].layer if one.module in layout.output_projections else None
    cosine = _cosine(_direction(one, one.module not in layout.output_projections), _vectors(program, block), False)
    return Baked("written", [one.change.name], block, one.change.norm, cosine=cosine)


def _ablated(real: Sequence[Difference], embeddings: Sequence[str], program: Program | None) -> Baked | None:
    """One direction u with W_new = (I - c u u^T) W in every one of the matrices, or None."""
    directions = [_direction(one, one.module in embeddings) for one in real]
    first = directions[0]
    if any(abs(float(torch.dot(first, other))) < _SAME for other in directions):
        return None
    coefficients = []
    for one in real:
        assert one.top is not None, "a matrix"
        embedding = one.module in embeddings
        there = one.top.written if embedding else one.top.read
        if there is None:
            return None
        given = one.top.s * (one.top.u if embedding else one.top.v)  # the change is u given^T
        coefficient = -float(torch.dot(given, there) / there.square().sum())
        if float((given + coefficient * there).norm() / given.norm()) > _LEFT:
            return None
        coefficients.append(coefficient)
    norm = sum(one.change.norm**2 for one in real) ** 0.5
    mean = sum(coefficients) / len(coefficients)
    cosine = _cosine(first, _vectors(program, None), False)
    return Baked("ablated", [one.change.name for one in real], None, norm, mean, cosine)


def _direction(one: Difference, embedding: bool) -> Tensor:
    """[d_model] the unit direction on the stream's side: what a writer writes, what every token's row has."""
    assert one.top is not None, "a matrix"
    return one.top.v if embedding else one.top.u


def _vectors(program: Program | None, block: int | None) -> Iterator[Tensor]:
    """The known vectors at that block, or all of them."""
    for one in program.active if program is not None else ():
        if block is None or one.site.changes_from == block:
            yield (one.coefficient if one.operation == "add" else 1.0) * one.vector.float()


def _cosine(found: Tensor, known: Iterator[Tensor], signed: bool) -> float | None:
    cosines = [float(torch.cosine_similarity(found.float(), one, dim=0)) for one in known if one.shape == found.shape]
    nearest = max(cosines, key=abs, default=None)
    return nearest if nearest is None or signed else abs(nearest)
