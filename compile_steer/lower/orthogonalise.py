"""`orthogonalise`: an affine edit of what a writer writes is an edit of the writer. Exact.

    h + c (s - u u^T h),  h = m (W x + b)   <=>   W <- W - c u (u^T W),  b <- b - c u (u^T b) + c s / m

with m the family's residual multiplier (Arditi et al. 2406.11717, appendix E, for c = 1 and s = 0). A
direction that is ablated at the embeddings and at every writer is never in the stream: ablation everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compile_steer.lower import bias
from compile_steer.lower.job import Job, first_refusal
from compile_steer.steering.layout import EXPERTS, Layout, ProjectionKind
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

_EMBEDDINGS = Site(0, "resid_pre")


def refusal(program: Program, layout: Layout) -> str | None:
    """Why this backend cannot hold the (canonical) program in stock weights, or None."""
    if program.interventions and all(one.operation == "add" for one in program.interventions):
        return "there is nothing to ablate; a shift is a bias"
    return first_refusal(program, layout, _refusal)


def _refusal(one: Intervention, layout: Layout) -> str | None:
    if one.operation == "add":
        held = one.site == _EMBEDDINGS or _kind(one) in layout.projection_kinds
        return bias.shift_refusal(one, layout) if held else f"the MLP is {EXPERTS}"
    if "all" not in one.scopes:
        return f"weights act at every position, not at {one.positions} alone"
    if one.site == _EMBEDDINGS:
        return (
            None
            if one.operation == "ablate"
            else "embeddings can lose a direction, but a clamp's shift has no bias there"
        )
    if one.site.point in ("resid_pre", "resid_post"):
        return "the stream there is a sum of many writers; ablate at every one of them (see ablate_everywhere)"
    if layout.post_norm or _kind(one) not in layout.projection_kinds:
        family = layout.model.config.model_type
        return f"{family} normalises what its writers write" if layout.post_norm else f"the MLP is {EXPERTS}"
    return bias.shift_refusal(one, layout) if one.operation == "clamp" else None


def adapter_refusal(program: Program, layout: Layout) -> str | None:
    """Why the result cannot ship as a stock PEFT adapter, or None."""
    for one in program.interventions:
        if one.site == _EMBEDDINGS:
            return "it edits the embeddings, which a plain LoRA does not hold: merged checkpoint only"
        if one.operation != "ablate" or layout.has_bias(layout.output_projection(one.site.layer, _kind(one))):
            return bias.adapter_refusal(program, layout)
    return None


def _kind(one: Intervention) -> ProjectionKind:
    return "attn" if one.site.point == "attn_out" else "mlp"


@dataclass
class _Affine:
    """What the edits so far make of one module: its matrix [d_model, n], its bias, and the factors of the change."""

    weight: Tensor
    bias: Tensor
    B: list[Tensor]
    A: list[Tensor]

    def ablate(self, u: Tensor, strength: float) -> None:
        row = u @ self.weight
        self.weight = self.weight - strength * torch.outer(u, row)
        self.bias = self.bias - strength * (u @ self.bias) * u
        self.B.append(-strength * u)
        self.A.append(row)


def lower(job: Job) -> WeightPatch:
    """Return the edits of writers and embeddings, and the biases that clamps and shifts need."""
    layout = job.loaded.layout
    edited: dict[str, _Affine] = {}
    flags: set[str] = set()
    # A shift of the block's output comes after what happens at its sublayers, whatever the program's order.
    for one in sorted(job.program.interventions, key=lambda one: one.site.point == "resid_post"):
        kind = _kind(one)
        names = (
            layout.family.embeddings
            if one.site == _EMBEDDINGS
            else (layout.output_projection(one.site.layer, kind).name,)
        )
        basis, shift = one.normal_form()
        for name in names:
            affine = edited.setdefault(name, _read(layout.model.get_submodule(name)))
            if basis is not None:
                affine.ablate(basis[:, 0].double().to(affine.weight.device), one.coefficient)
            affine.bias = affine.bias + one.coefficient * shift.to(affine.bias) / layout.residual_multiplier
        if bool(shift.any()):
            flags |= bias.flags_for(layout, layout.output_projection(one.site.layer, kind))
    embeddings = [name for name in edited if name in layout.family.embeddings]
    return WeightPatch(
        low_rank={name: _factors(affine, name in embeddings) for name, affine in edited.items() if affine.B},
        bias={name: change for name, a in edited.items() if bool((change := _bias_change(layout, name, a)).any())},
        config_flags=tuple(sorted(flags)),
        untie=bool(embeddings) and layout.tied,
    )


def _read(module: nn.Module) -> _Affine:
    """Matrix and bias in float64; an embedding's columns are its tokens."""
    weight = cast(Tensor, module.weight).double()
    weight = weight.T if isinstance(module, nn.Embedding | Conv1D) else weight
    held = getattr(module, "bias", None)
    return _Affine(weight, weight.new_zeros(weight.shape[0]) if held is None else held.double(), [], [])


def _factors(affine: _Affine, embedding: bool) -> LowRank:
    B, A = torch.stack(affine.B, dim=1).float(), torch.stack(affine.A).float()
    return LowRank(A.T, B.T) if embedding else LowRank(B, A)


def _bias_change(layout: Layout, name: str, affine: _Affine) -> Tensor:
    held = getattr(layout.model.get_submodule(name), "bias", None)
    return (affine.bias if held is None else affine.bias - held.double()).float()
