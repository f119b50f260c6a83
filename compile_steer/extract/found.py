"""What every method of extraction finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compile_steer.directions import unit


@dataclass(frozen=True)
class Found:
    """A direction a block, `vectors` [L, d], and `shuffled` [n, L, d] from labels that say nothing.

    `positive` [L, d] is the mean activation of what shows the behaviour, None where none was read. A block
    without a direction is 0.
    """

    vectors: Tensor
    shuffled: Tensor
    positive: Tensor | None = None

    def resized(self, length: Tensor) -> Found:
        """The same directions, each of `length` [L] at its block."""
        wanted = length.unsqueeze(-1)
        return Found(unit(self.vectors) * wanted, unit(self.shuffled) * wanted, self.positive)

    def projections(self) -> Tensor | None:
        """Mean projection [L] of the positive side on each unit direction: Stolfo's target (2410.12877)."""
        return None if self.positive is None else (self.positive * unit(self.vectors)).sum(dim=-1)
