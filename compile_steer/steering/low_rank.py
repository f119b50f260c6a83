"""Low-rank edits of a matrix: their sum, their decomposition, and the orientation in which a module stores a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LowRank:
    """W <- W + B A, with B [d_out, r] and A [r, d_in] in fp32."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def to(self, device: torch.device | str) -> LowRank:
        return LowRank(self.B.to(device), self.A.to(device))

    def detach(self) -> LowRank:
        return LowRank(self.B.detach(), self.A.detach())

    def padded(self, rank: int) -> LowRank:
        """The same edit with zero rows and columns up to `rank`."""
        # Serving engines take one rank for all modules of an adapter, and only certain ranks.
        extra = rank - self.rank
        if extra == 0:
            return self
        return self + LowRank(self.B.new_zeros(len(self.B), extra), self.A.new_zeros(extra, self.A.shape[1]))

    def __add__(self, other: LowRank) -> LowRank:
        """B A + B' A' as one edit of rank r + r'."""
        # Exact, unlike the sum of the factors, which would add the cross terms B A' and B' A.
        return LowRank(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A], dim=0))


def decompose(dense: Tensor | None, edit: LowRank | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of `dense` [d_out, d_in] and `edit` together, in float32; one of the two may be None.

    Returns U [d_out, n], the singular values [n] and V [n, d_in]. An embedding's d_out are its tokens.
    """
    if dense is not None:
        total = dense.float() if edit is None else dense.float() + edit.B @ edit.A
        U, S, V = torch.linalg.svd(total, full_matrices=False)
        return U, S, V
    if edit is None:
        raise ValueError("there is nothing to decompose: give a matrix, a low-rank edit, or both.")
    # B A = Q_B (R_B R_A^T) Q_A^T, so the decomposition of a small square matrix is enough.
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(edit.B.float()), torch.linalg.qr(edit.A.float().T)
    U, S, V = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, S, V @ Q_A.T


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a Linear, or of GPT-2's Conv1D, which stores the transpose."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def transpose_conv1d(module: nn.Module, matrix: Tensor) -> Tensor:
    """[d_out, d_in] <-> the orientation of `module.weight`: GPT-2's Conv1D stores [d_in, d_out], all others [d_out, d_in]."""
    return matrix.T if isinstance(module, Conv1D) else matrix


def weight_delta(module: nn.Module, edit: LowRank) -> Tensor:
    """B A in the orientation of `module.weight`."""
    return transpose_conv1d(module, edit.B @ edit.A)
