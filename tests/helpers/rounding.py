"""Comparisons of what is computed from tensors that were saved and read back.

A tensor that safetensors reads lies at another alignment in memory than one that torch allocated (48 bytes past a multiple
of 64, say), and on some processors a product then adds in another order. So saved tensors are compared bit by bit, but
what is computed from them only to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROUNDING = 5e-6  # of the largest value: 42 units in the last place of fp32, for a few blocks of a few matrices each


def assert_close_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """The largest difference is at most `tolerance` times the largest expected value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def assert_same_weights(model: nn.Module, original: nn.Module) -> None:
    """Every parameter of `original` is in `model`, bit by bit; what `model` has beside them is 0."""
    weights, expected = dict(model.named_parameters()), dict(original.named_parameters())
    assert expected.keys() <= weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, expected[name]) if name in expected else not value.any(), name
