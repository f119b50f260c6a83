"""The optimizer of low-rank edits: AdamW with steps relative to the rows and columns of their factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compile_steer.steering.low_rank import LowRank

# A shorter memory of squared gradients than AdamW's usual 0.999: a training has a few hundred steps.
BETAS = (0.9, 0.99)
_LEAST = 0.1  # of the median row or column: the size that a smaller one counts as


class RelativeAdamW(torch.optim.AdamW):
    """AdamW without decay, whose step has the size of the rate times `unit` of the parameter's group, entry by entry."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        before = [(p, group["unit"], p.clone()) for group in self.param_groups for p in group["params"]]
        loss = super().step(closure)
        for parameter, unit, old in before:
            parameter.sub_(old).mul_(unit).add_(old)
        return loss


def trainable(edits: Mapping[str, LowRank], device: torch.device) -> dict[str, LowRank]:
    """Copies of the edits whose factors an optimizer can train."""
    parameters = {
        name: [nn.Parameter(factor.float().to(device).clone()) for factor in (edit.B, edit.A)]
        for name, edit in edits.items()
    }
    return {name: LowRank(B, A) for name, (B, A) in parameters.items()}


def relative_adamw(edits: Mapping[str, LowRank], rate: float) -> RelativeAdamW:
    """The optimizer of low-rank edits: a step is relative to each row of B and each column of A, or to the size of the
    partner for a factor that starts at zero.

    AdamW's step has the size of the rate whatever the gradient's. Inputs and outputs of one projection differ by orders of
    magnitude, most of all in front of a norm with trained weights, and a fitted edit is the inverse of that: at one rate for a
    whole factor its small entries would be gone after a few steps.
    """
    groups: list[dict[str, object]] = []
    for edit in edits.values():
        for factor, dim, partner in ((edit.B, 1, edit.A), (edit.A, 0, edit.B)):
            sizes = factor.detach().square().mean(dim=dim, keepdim=True).sqrt()
            # The second is for factors of which most rows are zero: those would never move.
            least = max(_LEAST * float(sizes.median()), _LEAST**2 * float(sizes.square().mean().sqrt()))
            unit = sizes.clamp(min=least) if least > 0 else partner.detach().square().mean().sqrt()
            groups.append({"params": [factor], "unit": unit})
    return RelativeAdamW(groups, lr=rate, weight_decay=0.0, betas=BETAS)
