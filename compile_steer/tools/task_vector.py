"""Task vectors: a report on what a patch adds to the base's weights.

W_new = W_base + patch, so a patch times -1 takes away what it gives, and the sum of two gives both
(Ilharco et al. 2212.04089; the arithmetic is `WeightPatch`'s). That is exact of the weights; what the model then does
is for the judge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

_ENERGY = 0.99


@dataclass(frozen=True)
class MatrixReport:
    """One changed matrix.

    `norm` is Frobenius's, `stable_rank` its square over the square of the largest singular value, `rank_99` the
    number of singular values that hold 99 % of it. `cosine`, without sign, is of the top singular direction on the
    stream's side (what a writer writes, what any other Linear reads) with the nearest steering vector at or below
    the block; None where there is none. (A reader's direction is of the normed stream, the vector of the stream.)
    """

    name: str
    norm: float
    stable_rank: float
    rank_99: int
    cosine: float | None


def look_into(patch: WeightPatch, layout: Layout, program: Program | None) -> list[MatrixReport]:
    """A report on every matrix that the patch changes, in the order of the blocks."""
    sites = {
        name: (block, module) for block in range(layout.n_layers) for name, module in layout.linears(block).items()
    }
    writers = layout.output_projections
    order = list(sites)
    found = []
    for name in sorted(patch.matrices, key=lambda name: order.index(name) if name in sites else -1):
        U, S, V = patch.decompose(name, layout)
        squares = S.double().square()
        total = float(squares.sum())
        if total == 0.0:
            found.append(MatrixReport(name, 0.0, 0.0, 0, None))
            continue
        vector = vector_at(program, sites[name][0]) if program is not None and name in sites else None
        top = U[:, 0] if name in writers else V[0]
        found.append(
            MatrixReport(
                name,
                norm=total**0.5,
                stable_rank=total / float(squares[0]),
                rank_99=int((squares.cumsum(0) < _ENERGY * total).sum()) + 1,
                cosine=None if vector is None else abs(float(torch.cosine_similarity(top, vector, dim=0))),
            )
        )
    return found


def vector_at(program: Program, block: int) -> Tensor | None:
    """The vector of the last active intervention at or below `block`."""
    below = [one for one in program.active if one.site.changes_from <= block]
    return max(below, key=lambda one: one.site.changes_from).vector.float() if below else None
