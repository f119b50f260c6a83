"""Reduced-rank ridge regression against numpy's least squares and against every competitor of its rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from compile_steer.lowering.regression import RIDGES, RidgeFitter, Statistics, solve
from compile_steer.steering.low_rank import LowRank

D_IN, D_OUT, N = 9, 6, 60


class Problem:
    """Tokens x [n, d_in] with correlated inputs, y [n, d_out] with a noisy linear part, weights [n]."""

    def __init__(self, seed: int = 0, n: int = N, noise: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(-1)  # inputs and map have one law whatever the seed
        mixing, coefficients = (torch.randn(D_IN, d, generator=generator) for d in (D_IN, D_OUT))
        generator.manual_seed(seed)
        self.x = torch.randn(n, D_IN, generator=generator) @ mixing + 0.7
        self.y = self.x @ coefficients * torch.linspace(0.1, 2.0, D_OUT)
        self.y += noise * torch.randn(n, D_OUT, generator=generator)
        self.weight = torch.rand(n, generator=generator) + 0.1

    @property
    def sums(self) -> Statistics:
        sums = Statistics.zeros(D_IN, D_OUT, torch.device("cpu"))
        for part in (slice(0, 20), slice(20, 33), slice(33, None)):  # a stream
            sums.update(self.x[part], self.y[part], self.weight[part])
        return sums

    def penalty(self, ridge: float) -> float:
        second_moments = self.weight[:, None] * self.x.square()
        return ridge * float(second_moments.double().sum(dim=0).mean())

    def objective(self, ridge: float) -> Callable[[Tensor], float]:
        """sum w ||y - dW x||^2 + ridge * mean(diag G) ||dW||^2, straight from the data."""

        def value(dW: Tensor) -> float:
            rest = self.y.double() - self.x.double() @ dW.T
            fitted = (self.weight.double() * rest.square().sum(dim=1)).sum()
            return float(fitted + self.penalty(ridge) * dW.square().sum())

        return value

    def least_squares(self, ridge: float) -> Tensor:
        """The full-rank solution from numpy, the penalty written as extra rows."""
        root = np.sqrt(self.weight.double().numpy())[:, None]
        rows = np.vstack([root * self.x.double().numpy(), np.sqrt(self.penalty(ridge)) * np.eye(D_IN)])
        targets = np.vstack([root * self.y.double().numpy(), np.zeros((D_IN, D_OUT))])
        return torch.from_numpy(np.linalg.lstsq(rows, targets, rcond=None)[0].T)


def full(edit: LowRank) -> Tensor:
    return edit.B @ edit.A


@pytest.mark.parametrize("ridge", [1e-3, 0.03, 0.5])
def test_at_full_rank_the_solution_is_least_squares_with_a_penalty(ridge: float) -> None:
    problem = Problem()
    assert torch.allclose(full(solve(problem.sums, D_OUT, ridge)), problem.least_squares(ridge), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_cut_to_a_rank_beats_the_svd_s_and_random_ones(rank: int) -> None:
    problem, ridge = Problem(), 0.03
    objective = problem.objective(ridge)
    edit = solve(problem.sums, rank, ridge)
    assert tuple(edit.B.shape) == (D_OUT, rank)
    assert tuple(edit.A.shape) == (rank, D_IN)
    best = objective(full(edit))
    U, S, Vt = torch.linalg.svd(problem.least_squares(ridge))
    truncated = objective(U[:, :rank] * S[:rank] @ Vt[:rank])
    assert best < truncated * (1 - 1e-4), "the SVD in the wrong metric must be worse here"
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(10):
            B = edit.B + size * torch.randn(D_OUT, rank, generator=generator)
            A = edit.A + size * torch.randn(rank, D_IN, generator=generator)
            assert objective(B @ A) > best
    assert best > objective(problem.least_squares(ridge))


@pytest.mark.parametrize("rank", [1, 3])
def test_alternating_least_squares_ends_at_the_same_error(rank: int) -> None:
    problem, ridge = Problem(seed=3), 0.1
    sums, objective = problem.sums, problem.objective(ridge)
    damped = sums.G + problem.penalty(ridge) * torch.eye(D_IN, dtype=torch.float64)
    B = torch.randn(D_OUT, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(300):  # the exact minimum in A for a fixed B, then in B for a fixed A
        A = torch.linalg.solve(B.T @ B, B.T @ sums.C.T) @ torch.linalg.inv(damped)
        B = torch.linalg.solve(A @ damped @ A.T, A @ sums.C).T
    assert objective(full(solve(sums, rank, ridge))) == pytest.approx(objective(B @ A), rel=1e-6)


def test_more_rank_is_never_worse_and_a_rank_beyond_the_outputs_is_the_full_one() -> None:
    problem = Problem()
    objective = problem.objective(0.03)
    values = [objective(full(solve(problem.sums, rank, 0.03))) for rank in range(1, D_OUT + 1)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] * 1.05
    wide = solve(problem.sums, D_OUT + 4, 0.03)
    assert torch.allclose(full(wide), full(solve(problem.sums, D_OUT, 0.03)))


def test_the_error_from_the_sums_is_the_error_from_the_data() -> None:
    problem = Problem()
    generator = torch.Generator().manual_seed(5)
    for rank in (1, 3):
        edit = LowRank(
            torch.randn(D_OUT, rank, generator=generator).double(),
            torch.randn(rank, D_IN, generator=generator).double(),
        )
        assert problem.sums.error(edit) == pytest.approx(problem.objective(0.0)(full(edit)), rel=1e-5)


def test_a_constant_target_gives_rank_one_whatever_is_asked() -> None:
    problem, ridge = Problem(), 0.03
    s = torch.linspace(-1.0, 2.0, D_OUT)
    problem.y = s.expand(N, D_OUT).clone()
    edit = solve(problem.sums, 4, ridge)
    sizes = torch.linalg.svdvals(full(edit))
    assert float(sizes[1] / sizes[0]) < 1e-6
    G = problem.sums.G + problem.penalty(ridge) * torch.eye(D_IN, dtype=torch.float64)
    by_hand = torch.outer(s.double(), torch.linalg.solve(G, (problem.weight[:, None] * problem.x).double().sum(dim=0)))
    assert torch.allclose(full(edit), by_hand, rtol=1e-4, atol=1e-6)
    assert torch.allclose(full(solve(problem.sums, 1, ridge)), by_hand, rtol=1e-4, atol=1e-6)


def test_a_token_s_weight_counts_as_that_many_copies() -> None:
    problem = Problem()
    twice = Statistics.zeros(D_IN, D_OUT, torch.device("cpu"))
    weight = torch.ones(N)
    weight[:7] = 3.0
    twice.update(problem.x, problem.y, weight)
    copies = Statistics.zeros(D_IN, D_OUT, torch.device("cpu"))
    copies.update(problem.x, problem.y, torch.ones(N))
    for _ in range(2):
        copies.update(problem.x[:7], problem.y[:7], torch.ones(7))
    assert torch.allclose(twice.G, copies.G, rtol=1e-5)
    assert torch.allclose(twice.C, copies.C, rtol=1e-5, atol=1e-4)
    assert float(twice.yy) == pytest.approx(float(copies.yy), rel=1e-5)


def fitted(train: Problem, held_out: Problem) -> RidgeFitter:
    fitter = RidgeFitter(D_IN, D_OUT, torch.device("cpu"))
    for part in (train, held_out):
        fitter.update(part.x, part.y, part.weight, torch.full((len(part.x),), part is held_out))
    return fitter


def test_the_fitter_takes_the_ridge_with_the_least_held_out_error_and_then_all_data() -> None:
    chosen = set()
    for seed, n, noise in ((1, N, 0.5), (7, 14, 6.0), (2, 12, 20.0)):
        fitter = fitted(Problem(seed, n, noise), Problem(seed + 100, N, noise))
        errors = {ridge: fitter.held_out.error(solve(fitter.train, 2, ridge)) for ridge in RIDGES}
        best = min(errors, key=lambda ridge: errors[ridge])
        chosen.add(best)
        assert torch.equal(full(fitter.fit(2)[0]), full(solve(fitter.train + fitter.held_out, 2, best)))
    assert len(chosen) > 1, "the data must not all choose the same ridge"


def test_with_nothing_held_out_the_largest_ridge_is_taken() -> None:
    fitter = fitted(Problem(), Problem(n=0))
    assert torch.equal(full(fitter.fit(2)[0]), full(solve(fitter.train, 2, RIDGES[-1])))


def test_inputs_that_are_all_zero_have_the_solution_zero() -> None:
    sums = Statistics.zeros(D_IN, D_OUT, torch.device("cpu"))
    sums.update(torch.zeros(5, D_IN), torch.ones(5, D_OUT), torch.ones(5))  # as behind a norm whose weights are zero
    assert not bool(full(solve(sums, 2, RIDGES[0])).any())
