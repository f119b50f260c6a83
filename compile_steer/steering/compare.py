"""Whether two tensors are the same, or one a multiple of the other, to the rounding of their type."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the norm of what comes out. In float32 a true writer leaves 1e-6 and the nearest false one 5e-2; in bf16 a true one 8e-3.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_COARSE_TOLERANCE = 3e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference below which two tensors of that type are the same, to rounding."""
    return _TOLERANCE.get(dtype, _COARSE_TOLERANCE)


def delta_of(reference: Tensor) -> Tensor:
    """A fixed random constant [d_model] as large as a typical token of `reference` [..., d_model]."""
    generator = torch.Generator().manual_seed(0)
    # The median token: the first one's norm is hundreds of times that of the others in many models.
    size = reference.reshape(-1, reference.shape[-1]).float().square().mean(dim=1).sqrt().median()
    delta = torch.randn(reference.shape[-1], generator=generator).to(reference.device) * size.clamp(min=1e-6)
    return delta.to(reference.dtype)


def multiple(change: Tensor, delta: Tensor) -> float | None:
    """m where `change` [..., d_model] is m times `delta` at every token, to rounding; else None."""
    rows, direction = change.reshape(-1, len(delta)).double(), delta.double()
    factors = (rows @ direction) / (direction @ direction)
    m = float(factors.median())
    # Tokens whose own size drowns the constant in rounding (the first one, in many models) have no say.
    errors = (rows - m * direction).norm(dim=1) / direction.norm()
    tolerance = tolerance_of(delta.dtype) * max(1.0, abs(m))
    return m if abs(m) > 1e-3 and float(errors.quantile(0.75)) < tolerance else None


def differ(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """True if two tensors of that type are further apart than its rounding."""
    return distance(left, right) > tolerance_of(dtype) / 10


def distance(left: Tensor, right: Tensor) -> float:
    """The norm of their difference over that of `right`."""
    return float((left - right).float().norm() / right.float().norm().clamp(min=1e-12))
