"""Output projections behind which a norm stands (Gemma 2 and 3, OLMo 2): their targets, and the edit that the norm passes.

An RMS norm turns the projection's output z into D z / rms(z), with D its weights. The regression is linear in the edit,
so it takes rms(z) as given and leaves D to the solution: it yields what has to be read (A x), and a start for what is
written (B). But what is written changes the RMS too, and real weights reach from .01 to 900 within one norm: divided by a
weight near 0, the edit would be many times what the projection writes. So B is then solved on what the norm makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from compile_steer.common.distributed import sum_over_all
from compile_steer.steering.layout import Layout, OutputProjection
from compile_steer.steering.low_rank import LowRank

_DAMPING = 0.1  # of small norm weights in the start, relative to the median one
_ITERATIONS = 40
_EPSILON = 1e-6  # of the norm: matters for no token but one that is almost zero


@dataclass(frozen=True)
class Behind:
    """Tokens in front of a norm.

    Attributes:
        read: A x, [n, rank].
        written: z, [n, d_model].
        missing: the change of the norm's output that is wanted, [n, d_model].
        weight: what a squared error of it counts, [n].
    """

    read: Tensor
    written: Tensor
    missing: Tensor
    weight: Tensor


def behind_norm(start: LowRank, gain: Tensor, tokens: Sequence[Behind], penalty: float) -> LowRank:
    """The edit B A of W that minimises sum w ||missing - (norm(z + B A x) - norm(z))||^2 + penalty ||D B A||^2.

    Solved for B by L-BFGS: with the RMS held at rms(z), `start` would be the answer.

    Args:
        start: the regression's solution, D B A.
        gain: the norm's weights, D [d_model].
    """
    shape = gain.shape
    wanted = [rms_norm(part.written, shape, gain, _EPSILON) + part.missing for part in tokens]
    scale, read = torch.zeros((), device=gain.device), torch.zeros(start.rank, device=gain.device)
    for part in tokens:
        scale += (part.weight * part.missing.square().sum(dim=1)).sum()
        read += (
            part.read.square() * (part.weight / part.written.square().mean(dim=1).clamp(min=1e-12)).unsqueeze(1)
        ).sum(dim=0)
    sum_over_all(scale, read)
    # In units in which the loss has a curvature of about 1 in every direction, but for weights near 0: L-BFGS then needs
    # tens of steps, and its tolerances have a meaning.
    unit = (read / scale).clamp(min=1e-12).sqrt()
    size = (gain / (gain.square() + (_DAMPING * gain.abs().median()).square())).unsqueeze(1) / unit
    solution = (start.B * unit).contiguous().requires_grad_()  # L-BFGS takes a view of it
    inner = start.A @ start.A.T
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=_ITERATIONS, history_size=20, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=gain.device)
        for part, target in zip(tokens, wanted, strict=True):
            output = rms_norm(part.written + part.read @ (size * solution).T, shape, gain, _EPSILON)
            loss = (part.weight * (target - output).square().sum(dim=1)).sum() / scale
            loss.backward()
            total += loss.detach()
        sum_over_all(total, cast(Tensor, solution.grad))
        # Once, and not in every process.
        edit = gain.unsqueeze(1) * size * solution
        ridge = penalty / scale * ((edit.T @ edit) * inner).sum()
        ridge.backward()
        return total + ridge.detach()

    with torch.enable_grad():
        optimizer.step(closure)
    return LowRank((size * solution).detach(), start.A)


def norm_weights(layout: Layout, projection: OutputProjection) -> Tensor | None:
    """The weights [d_model] of the RMS norm between projection and stream (post-norm families), or None."""
    norm = layout.norm(projection.layer, projection.kind)
    if norm is None:
        return None
    ones = torch.ones(layout.d_model, device=layout.device_of(projection.layer), dtype=layout.model.dtype)
    with torch.no_grad():
        # The RMS of ones is 1, so the norm's output is its weights, however the family stores them.
        weights: Tensor = norm(ones)
    return weights.float()


def regression_targets(
    missing: Tensor, written: Tensor, weight: Tensor, multiplier: float, gain: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Targets y [n, d_model] and token weights [n] with which the regression's error is the weighted one in the stream.

    A projection's output z enters the stream, linearised, as h += g_t * (D z). In pre-norm families g is the residual
    multiplier and D = 1; behind an RMS norm g_t = 1/rms(z_t) and D are its weights, which are left to the solution.

    Args:
        missing: the change of the stream that is wanted, [n, d_model].
        written: z, [n, d_model]. weight: what a squared error in the stream counts, [n].
        gain: the norm's weights, [d_model], or None.
    """
    missing = missing / multiplier
    if gain is None:
        return missing, weight
    rms = written.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    return missing * rms, weight / rms.squeeze(1).square()
