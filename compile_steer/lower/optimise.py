"""What every training of this package shares: which batches are held out, the factors, AdamW and its rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from compile_steer.common.errors import CannotLower
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.patch import WeightPatch

T = TypeVar("T")
Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]

BETAS = (0.9, 0.99)
_HELD_OUT_EVERY = 6


def held_out_split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """(held out, seen): a sixth is held out; a single item is both."""
    return list(items[::_HELD_OUT_EVERY]), [one for n, one in enumerate(items) if n % _HELD_OUT_EVERY] or list(items)


def require_rank(layout: Layout, block: int, rank: int, key: str) -> None:
    """Raise `CannotLower` where a Linear of the block cannot have the rank that the recipe's `key` asks for."""
    for name, module in layout.linears(block).items():
        if rank > min(linear_shape(module)):
            d_out, d_in = linear_shape(module)
            raise CannotLower(f"{key} {rank} is above what {name} ({d_out} x {d_in}) can have.")


def trainable(edits: Mapping[str, LowRank], device: torch.device) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Copies of the edits' factors (B, A) that AdamW can train."""
    return {
        name: (nn.Parameter(edit.B.float().to(device).clone()), nn.Parameter(edit.A.float().to(device).clone()))
        for name, edit in edits.items()
    }


def worn(factors: Factors) -> WeightPatch:
    """The patch made of live factors."""
    return WeightPatch({name: LowRank(B, A) for name, (B, A) in factors.items()})


def adamw(factors: Factors, rate: float) -> torch.optim.AdamW:
    """AdamW without decay. Its step has the size of the rate whatever the gradient's, so the rate is taken
    relative to each factor's own root mean square (its partner's, for a factor that starts at zero).
    """
    groups: list[dict[str, object]] = []
    for B, A in factors.values():
        sizes = [float(factor.detach().square().mean().sqrt()) for factor in (B, A)]
        for factor, size, other in zip((B, A), sizes, reversed(sizes), strict=True):
            groups.append({"params": [factor], "lr": rate * (size or other)})
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Linear warm-up over a tenth of the steps, then cosine decay to zero, of each group's own rate."""
    warm = max(1, steps // 10)
    shape = (step + 1) / warm
    if step >= warm:
        shape = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * shape
