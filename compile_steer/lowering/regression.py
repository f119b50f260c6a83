"""Weighted reduced-rank ridge regression from streamed sums (Izenman 1975)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.common.distributed import sum_over_all
from compile_steer.steering.low_rank import LowRank

# Relative to the mean diagonal of G; the held-out error decides between them.
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass
class Statistics:
    """All that a regression y ~ dW x over tokens with weights w needs of them, in float64.

    Attributes:
        G: [d_in, d_in], sum w x x^T.
        C: [d_in, d_out], sum w x y^T.
        yy: [], sum w ||y||^2.
    """

    G: Tensor
    C: Tensor
    yy: Tensor

    @staticmethod
    def zeros(d_in: int, d_out: int, device: torch.device) -> Statistics:
        shapes: tuple[tuple[int, ...], ...] = ((d_in, d_in), (d_in, d_out), ())
        return Statistics(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def update(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens x [n, d_in], y [n, d_out] with weights [n]; products in float32, sums in float64."""
        # Sums in float64: in float32 a long sum would lose what its last tokens add.
        weighted = x * weight.unsqueeze(1)
        self.G += weighted.T @ x
        self.C += weighted.T @ y
        self.yy += (weight * y.square().sum(dim=1)).sum()

    def part(self, inputs: slice) -> Statistics:
        """Those of some of the inputs alone."""
        return Statistics(self.G[inputs, inputs].clone(), self.C[inputs].clone(), self.yy)

    def scale(self, factors: Tensor) -> None:
        """Multiply each input by its factor, [d_in]."""
        self.G *= factors.unsqueeze(1) * factors
        self.C *= factors.unsqueeze(1)

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.G + other.G, self.C + other.C, self.yy + other.yy)

    def error(self, edit: LowRank) -> float:
        """sum w ||y - B A x||^2 over these tokens."""
        B, A = edit.B, edit.A
        cross = ((A @ self.C) * B.T).sum()
        return float(self.yy - 2 * cross + ((A @ self.G @ A.T) * (B.T @ B)).sum())


def solve(statistics: Statistics, rank: int, ridge: float) -> LowRank:
    """min over rank(dW) <= rank of sum w ||y - dW x||^2 + ridge * mean(diag G) ||dW||^2, as B A in float64."""
    # Relative to the mean of the diagonal, so that a ridge means the same at every width and scale.
    G = statistics.G
    damping = ridge * G.diagonal().mean().clamp(min=1e-30)  # inputs that are all zero have the solution 0
    damped = G + damping * torch.eye(len(G), dtype=G.dtype, device=G.device)
    full = torch.cholesky_solve(statistics.C, torch.linalg.cholesky(damped)).T
    # In the damped metric the objective is ||(dW - full) damped^(1/2)||^2 plus a constant, so the best rank
    # is the top eigenvectors of full damped full^T.
    _values, vectors = torch.linalg.eigh(full @ damped @ full.T)
    basis = vectors[:, -rank:].flip(1)
    return LowRank(basis, basis.T @ full)


class RidgeFitter:
    """Streams tokens, then chooses the ridge by the error on the held-out ones and solves on all.

    Attributes:
        train, held_out: the statistics of both parts.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.train = Statistics.zeros(d_in, d_out, device)
        self.held_out = Statistics.zeros(d_in, d_out, device)
        self._chosen: dict[int, tuple[float, bool]] = {}  # by rank: a fit to fewer texts and one to all choose alike

    def update(self, x: Tensor, y: Tensor, weight: Tensor, held_out: Tensor) -> None:
        """Add tokens x [n, d_in], y [n, d_out] with weights [n]; `held_out` [n] is boolean."""
        for statistics, chosen in ((self.train, ~held_out), (self.held_out, held_out)):
            statistics.update(x[chosen], y[chosen], weight[chosen])

    def exchange(self) -> None:
        """Add what every other process has streamed. Call once, before `fit`."""
        for part in (self.train, self.held_out):
            sum_over_all(part.G, part.C, part.yy)

    def resize(self, inputs: slice, others: slice, times: float = 1.0) -> float:
        """Make `inputs` `times` as large in root mean square as `others`, if neither are all zero; returns their factor."""
        sizes = self.train.G.diagonal()
        own, other = float(sizes[inputs].mean()), float(sizes[others].mean())
        factor = times * (other / own) ** 0.5 if own and other else 1.0
        factors = torch.ones_like(sizes)
        factors[inputs] = factor
        for statistics in (self.train, self.held_out):
            statistics.scale(factors)
        return factor

    def part(self, inputs: slice) -> RidgeFitter:
        """A fitter that has streamed the same tokens with some of the inputs alone."""
        part = copy(self)
        part._chosen = {}
        part.train, part.held_out = self.train.part(inputs), self.held_out.part(inputs)
        return part

    def fit(self, rank: int, *, to_all: bool = True) -> tuple[LowRank, float, bool]:
        """The edit of at most `rank` in float64, the factor of ||dW||^2 that was chosen for it, and whether it helps on
        tokens that it was not fitted to.

        Args:
            to_all: fit it to the held-out tokens too, once they have chosen.
        """
        total = self.train + self.held_out if to_all else self.train
        if rank not in self._chosen:
            self._chosen[rank] = self._choose(rank)
        ridge, helps = self._chosen[rank]
        return solve(total, rank, ridge), ridge * float(total.G.diagonal().mean()), helps

    def _choose(self, rank: int) -> tuple[float, bool]:
        """The ridge with the least error on the held-out tokens, and whether that is less than without an edit."""
        if float(self.train.G.trace()) == 0.0 or float(self.held_out.G.trace()) == 0.0:
            return RIDGES[-1], True  # too few texts to choose by: the largest ridge is the safest
        errors = {ridge: self.held_out.error(solve(self.train, rank, ridge)) for ridge in RIDGES}
        ridge = min(RIDGES, key=lambda ridge: errors[ridge])
        return ridge, errors[ridge] < float(self.held_out.yy)
