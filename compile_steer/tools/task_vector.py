"""Task vectors: what a patch adds to the base's weights, cut to a low rank and looked into.

W_new = W_base + patch, so a patch times -1 takes away what it gives, and the sum of two gives both
(Ilharco et al. 2212.04089; the arithmetic is `WeightPatch`'s). That is exact of the weights; what the model then does
is for the judge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import LowRank, WeightPatch, turned
from compile_steer.steering.program import Program

_ENERGY = 0.99


def cut(patch: WeightPatch, rank: int, layout: Layout) -> WeightPatch:
    """Every matrix that was changed at a higher rank, at its best approximation of `rank` (Eckart and Young)."""
    low_rank = dict(patch.low_rank)
    for name in _matrices(patch):
        if name in patch.dense or low_rank[name].rank > rank:
            U, S, V = _decomposed(patch, name, layout)
            low_rank[name] = LowRank((U * S)[:, :rank].contiguous(), V[:rank].contiguous())
    return replace(patch, low_rank=low_rank, dense={})


def _matrices(patch: WeightPatch) -> list[str]:
    return sorted({*patch.low_rank, *patch.dense})


def _decomposed(patch: WeightPatch, name: str, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the whole change of one matrix of the patch; see `decompose`."""
    whole = patch.dense.get(name)
    return decompose(
        None if whole is None else turned(layout.model.get_submodule(name), whole), patch.low_rank.get(name)
    )


def decompose(whole: Tensor | None, edit: LowRank | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, n], singular values [n] and V [n, d_in] of `whole` [d_out, d_in] and `edit` together, in float32.

    An embedding's d_out are its tokens.
    """
    if whole is not None:
        both = whole.float() if edit is None else whole.float() + edit.B @ edit.A
        U, S, V = torch.linalg.svd(both, full_matrices=False)
        return U, S, V
    assert edit is not None, "one of the two is there"
    # B A = Q_B (R_B R_A^T) Q_A^T: the decomposition of a small square is enough
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(edit.B.float()), torch.linalg.qr(edit.A.float().T)
    U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, V @ Q_A.T


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
    for name in sorted(_matrices(patch), key=lambda name: order.index(name) if name in sites else -1):
        U, S, V = _decomposed(patch, name, layout)
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
