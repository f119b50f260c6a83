"""APOLLO against the paper's equations, written out here with nothing shared but the drawn projection."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from compile_steer.lowering.full import Apollo, projection

RATE, FIRST, SECOND, EPSILON = 0.03, 0.8, 0.95, 1e-7


def gradients(shape: tuple[int, int], count: int, growth: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    return [growth**n * torch.randn(shape, generator=generator) for n in range(count)]


def descend(start: Tensor, grads: list[Tensor], rank: int, refresh: int = 200) -> list[Tensor]:
    parameter = nn.Parameter(start.clone())
    optimizer = Apollo(
        [{"params": [parameter], "lr": RATE}],
        rank=rank,
        seed=5,
        betas=(FIRST, SECOND),
        epsilon=EPSILON,
        refresh=refresh,
    )
    path = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        path.append(parameter.detach().clone())
    return path


def equations(start: Tensor, grads: list[Tensor], rank: int, refresh: int = 200) -> list[Tensor]:
    """Algorithm 1 of the paper, channel by channel in float64, for a matrix that is wider than tall."""
    W, path, before = start.double(), [], math.inf
    M = V = torch.zeros(rank, start.shape[1], dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        P = projection(grad, rank, (5, 1, (t - 1) // refresh)).double()
        R = P @ grad.double()
        M, V = FIRST * M + (1 - FIRST) * R, SECOND * V + (1 - SECOND) * R**2
        adam = (M / (1 - FIRST**t)) / ((V / (1 - SECOND**t)) ** 0.5 + EPSILON)
        if rank == 1:
            scaled = math.sqrt(128) * grad.double() * (adam.norm() / R.norm())
        else:
            columns = [grad[:, j].double() * adam[:, j].norm() / R[:, j].norm() for j in range(grad.shape[1])]
            scaled = math.sqrt(grad.shape[0] / rank) * torch.stack(columns, dim=1)
        if scaled.norm() / before > 1.01:
            scaled = scaled / scaled.norm() * 1.01 * before
        before = float(scaled.norm())
        W = W - RATE * scaled
        path.append(W)
    return path


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("growth", [0.5, 7.0])
def test_every_step_is_the_papers(rank: int, growth: float) -> None:
    start, grads = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)), gradients((6, 11), 4, growth)
    for actual, expected in zip(descend(start, grads, rank, 2), equations(start, grads, rank, 2), strict=True):
        assert torch.allclose(actual.double(), expected, atol=1e-5)
        assert not torch.allclose(actual, start, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_tall_matrix_is_the_wide_one_turned_round(rank: int) -> None:
    start, grads = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)), gradients((6, 11), 3)
    turned = descend(start.T.contiguous(), [grad.T.contiguous() for grad in grads], rank)
    assert torch.allclose(turned[-1].T, descend(start, grads, rank)[-1], atol=1e-6)


def test_an_update_cannot_outgrow_the_one_before_by_more_than_a_hundredth() -> None:
    start = torch.zeros(6, 11)
    path = [start, *descend(start, gradients((6, 11), 5, 3.0), 2)]
    norms = [float((after - before).norm()) for before, after in itertools.pairwise(path)]
    assert all(later <= 1.0101 * earlier for earlier, later in itertools.pairwise(norms))


def test_the_projection_has_unit_variance_over_the_rank_and_comes_back_from_its_seed() -> None:
    G = torch.zeros(400, 2)
    P = projection(G, 25, (1, 2, 3))
    assert tuple(P.shape) == (25, 400)
    assert float(P.var()) == pytest.approx(1 / 25, rel=0.05)
    assert torch.equal(P, projection(G, 25, (1, 2, 3)))
    assert not torch.equal(P, projection(G, 25, (1, 2, 4)))


def test_the_state_is_two_thin_matrices_and_no_projection() -> None:
    parameter = nn.Parameter(torch.ones(40, 30))
    optimizer = Apollo([{"params": [parameter], "lr": RATE}], rank=4, seed=0)
    assert optimizer.step() is None, "without a gradient nothing moves"
    assert torch.equal(parameter.detach(), torch.ones(40, 30))
    assert optimizer.step(lambda: 3.5) == 3.5
    parameter.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    held = [value.numel() for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    assert held == [4 * 40, 4 * 40]
