"""APOLLO (Zhu et al., arXiv 2412.05270): AdamW's step sizes, one a channel, estimated in a small random subspace.

For a gradient G [m, n] with m <= n, turned round where its rows are the longer side:

    R = P G,  P [r, m] ~ N(0, 1/r),  drawn anew every `refresh` steps from a seed
    R~ = AdamW's direction for R, from moments of R alone
    s_j = ||R~[:, j]|| / ||R[:, j]||        for each of the n channels; for r = 1 one s for the whole matrix
    W <- W - rate * limited(alpha G diag(s))

An update whose norm is above 1.01 times the one before is brought down to that. The norms of R and R~ compare
as if there were r rows and not m, which alpha = sqrt(m / r) makes good (the paper's theorem on the ratio); for
r = 1 (APOLLO-Mini) alpha is the paper's sqrt(128). State: two r x n matrices, a seed and a norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_GROWTH = 1.01
_MINI_SCALE = math.sqrt(128)


class Apollo(Optimizer):
    """APOLLO without weight decay for matrices; `rank` 1 is APOLLO-Mini.

    Args:
        groups: dicts of `params` and `lr`, as every optimizer of torch takes them.
        rank: of the random subspace; a matrix with a shorter side is not projected beyond that side.
        refresh: steps between projections.
        seed: of the projections; each matrix has its own.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        rank: int,
        seed: int,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-8,
        refresh: int = 200,
    ) -> None:
        super().__init__(groups, {})
        self._rank, self._seed, self._refresh = rank, seed, refresh
        self._betas, self._epsilon = betas, epsilon

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every matrix that has a gradient; returns the closure's loss, if there is a closure."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    update = self._update(parameter, self.state[parameter], number)
                    parameter.add_(update, alpha=-group["lr"])
        return loss

    def _update(self, parameter: Tensor, state: dict[str, Any], number: int) -> Tensor:
        grad = parameter.grad.float()  # type: ignore[union-attr]
        tall = grad.shape[0] > grad.shape[1]
        G = grad.T if tall else grad
        rank = min(self._rank, G.shape[0])
        if not state:
            zeros = G.new_zeros(rank, G.shape[1])
            state |= {"step": 0, "first": zeros, "second": zeros.clone(), "norm": math.inf}
        R = projection(G, rank, (self._seed, number, state["step"] // self._refresh)) @ G
        state["step"] += 1
        direction = self._direction(R, state)
        channels = None if rank == 1 else 0
        scale = torch.linalg.vector_norm(direction, dim=channels) / torch.linalg.vector_norm(R, dim=channels).clamp(
            min=torch.finfo(R.dtype).tiny
        )
        update = G * scale * (_MINI_SCALE if rank == 1 else math.sqrt(G.shape[0] / rank))
        norm = float(update.norm())
        limit = _GROWTH * state["norm"]
        if norm > limit > 0:
            update, norm = update * (limit / norm), limit
        state["norm"] = norm
        turned: Tensor = update.T if tall else update
        return turned

    def _direction(self, R: Tensor, state: dict[str, Any]) -> Tensor:
        """Bias-corrected first moment over the root of the second, as AdamW's."""
        one, two = self._betas
        state["first"].lerp_(R, 1 - one)
        state["second"].mul_(two).addcmul_(R, R, value=1 - two)
        first = state["first"] / (1 - one ** state["step"])
        root = (state["second"] / (1 - two ** state["step"])).sqrt()
        direction: Tensor = first / (root + self._epsilon)
        return direction


def projection(G: Tensor, rank: int, seed: tuple[int, int, int]) -> Tensor:
    """P [rank, m] ~ N(0, 1 / rank), the same for the same seed, so that it need not be kept."""
    generator = torch.Generator().manual_seed(hash(seed) % 2**63)
    return torch.randn(rank, G.shape[0], generator=generator).to(G) / math.sqrt(rank)
