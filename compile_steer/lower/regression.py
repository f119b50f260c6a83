"""Weighted reduced-rank ridge regression from streamed sums (Izenman 1975)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.common.distributed import sum_over_all
from compile_steer.steering.low_rank import LowRank

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass
class Sums:
    """Sufficient statistics of one regression y ~ dW x over tokens with weights w, in float64.

    G [d_in, d_in] = sum w x x^T, C [d_in, d_out] = sum w x y^T, yy = sum w ||y||^2.
    """

    G: Tensor
    C: Tensor
    yy: Tensor

    @staticmethod
    def zeros(d_in: int, d_out: int, device: torch.device) -> Sums:
        return Sums(
            torch.zeros(d_in, d_in, dtype=torch.float64, device=device),
            torch.zeros(d_in, d_out, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens x [n, d_in], y [n, d_out] with weights [n]; products in float32, sums in float64."""
        weighted = x * weight.unsqueeze(1)
        self.G += weighted.T @ x
        self.C += weighted.T @ y
        self.yy += (weight * y.square().sum(dim=1)).sum()

    def over_all_processes(self) -> Sums:
        """The sums over every process's texts."""
        sum_over_all(self.G, self.C, self.yy)
        return self

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.G + other.G, self.C + other.C, self.yy + other.yy)

    def error(self, edit: LowRank) -> float:
        """sum w ||y - B A x||^2 over these tokens, from the sums alone."""
        B, A = edit.B, edit.A
        cross = ((A @ self.C) * B.T).sum()
        return float(self.yy - 2 * cross + ((A @ self.G @ A.T) * (B.T @ B)).sum())


def solve(sums: Sums, rank: int, ridge: float) -> LowRank:
    """min over rank(dW) <= rank of sum w ||y - dW x||^2 + ridge * mean(diag G) ||dW||^2, as B A in float64."""
    d_in = sums.G.shape[0]
    eye = torch.eye(d_in, dtype=sums.G.dtype, device=sums.G.device)
    damped = sums.G + ridge * sums.G.diagonal().mean() * eye
    full = torch.cholesky_solve(sums.C, torch.linalg.cholesky(damped)).T
    # In the damped metric the objective is ||(dW - full) damped^(1/2)||^2 plus a constant, so the best rank
    # is the top eigenvectors of full damped full^T.
    _values, vectors = torch.linalg.eigh(full @ damped @ full.T)
    basis = vectors[:, -rank:].flip(1)
    return LowRank(basis, basis.T @ full)


def fit(train: Sums, held_out: Sums, rank: int) -> LowRank:
    """Choose the ridge by the error on held-out sums, then solve on all of them."""
    if float(train.G.trace()) == 0.0 or float(held_out.G.trace()) == 0.0:
        return solve(train + held_out, rank, RIDGES[-1])  # too few texts to choose by: the safest
    ridge = min(RIDGES, key=lambda r: held_out.error(solve(train, rank, r)))
    return solve(train + held_out, rank, ridge)
