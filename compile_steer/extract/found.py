"""What every method of extraction finds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compile_steer.steering.directions import FROM_LABELS, unit


@dataclass(frozen=True)
class Found:
    """A direction a block, `vectors` [L, d], and `shuffled` [n, L, d] from labels that say nothing.

    `positive` [1 + n, L, d] is the mean activation of what shows the behaviour, and of what the shuffled labels
    say does; None where none was read. `controls` is what `shuffled` are, in words. A block without a direction is 0.
    """

    vectors: Tensor
    shuffled: Tensor
    positive: Tensor | None = None
    controls: str = FROM_LABELS

    def resized(self, length: Tensor) -> Found:
        """The same directions, each of `length` [L] at its block."""
        wanted = length.unsqueeze(-1)
        return replace(self, vectors=unit(self.vectors) * wanted, shuffled=unit(self.shuffled) * wanted)

    def projections(self) -> Tensor | None:
        """Mean projection [1 + n, L] of each positive side on its unit direction: Stolfo's target (2410.12877)."""
        if self.positive is None:
            return None
        return (self.positive * unit(torch.cat([self.vectors[None], self.shuffled]))).sum(dim=-1)
