"""The exact backends: a program whose edits are affine in what one matrix writes, as weights and biases.

`bias`: a constant shift at every position is a bias of an output projection (m: the family's residual multiplier):

    h + c v = h_mid + m (W x + b),   b = c v / m

`orthogonalise`: an affine edit of what a projection writes is an edit of the projection (Arditi et al. 2406.11717,
appendix E, for c = 1 and s = 0). A direction that is ablated at the embeddings and at every projection is never in the
stream:

    h + c (s - u u^T h),  h = m (W x + b)   <=>   W <- W - c u (u^T W),  b <- b - c u (u^T b) + c s / m

`convert_architecture`: `LlamaForCausalLM` with `attention_bias` and `mlp_bias` computes what Mistral and Qwen2 compute
where no sliding window acts, from tensors of the same names. Such a checkpoint is rewritten as Llama; then `bias` holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compile_steer.steering.layout import NATIVE, Layout, OutputProjection
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.measure import ProjectionKind
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

_EMBEDDINGS = Site(0, "resid_pre")
_CONVERTIBLE, _CONVERTED = ("mistral", "qwen2"), "llama"
_CONVERTED_FLAGS: dict[ProjectionKind, str] = {"attn": "attention_bias", "mlp": "mlp_bias"}
NO_ADAPTER_BIAS = "a LoRA on a Linear without a bias cannot hold one (PEFT refuses to merge it): merged checkpoint only"


def first_refusal(
    program: Program, layout: Layout, refusal: Callable[[Intervention, Layout], str | None] = lambda *_: None
) -> str | None:
    """The first reason that `refusal` has against an intervention, with its name; an empty program is refused too."""
    if not program.interventions:
        return "the program has no active intervention; there is nothing to compile"
    reasons = ((i, refusal(i, layout)) for i in program.interventions)
    return next((f"{i.operation} at {i.site}: {reason}" for i, reason in reasons if reason is not None), None)


def _kind(intervention: Intervention) -> ProjectionKind:
    """The sublayer whose output projection holds the edit: a shift of a block's output is one of what its MLP writes."""
    return "attn" if intervention.site.point == "attn_out" else "mlp"


# ---------------------------------------------------------------------------------------------- bias


def bias_refusal(program: Program, layout: Layout) -> str | None:
    """Why biases of stock weights cannot hold the canonical program, or None."""

    def refusal(i: Intervention, layout: Layout) -> str | None:
        return _shift_refusal(i, layout) if i.operation == "add" else f"a bias cannot {i.operation}; it only shifts"

    return first_refusal(program, layout, refusal)


def _shift_refusal(intervention: Intervention, layout: Layout) -> str | None:
    """Why no stock bias can hold the shift of one intervention, or None."""
    family, kind, layer = layout.model.config.model_type, _kind(intervention), intervention.site.layer
    if "all" not in intervention.scopes:
        return f"a bias acts at every position, not at {intervention.positions} alone"
    if intervention.site == _EMBEDDINGS:
        return "no output projection lies below block 0"
    if _is_normalised(layout, layer, kind):
        return f"{family} normalises what its output projections write, so a bias is not a shift of the stream"
    sublayer = layout.measured.sublayers[layer].get(kind)
    if sublayer is not None and not sublayer.last and intervention.site.point in ("resid_pre", "resid_post"):
        return f"another sublayer of the block reads what its {kind} writes, so a bias there shifts more than the block's output"
    if kind in layout.projection_kinds(layer):
        legal = layout.bias_flag(layer, kind) is not None
        reason = f"needs a bias on {layout.output_projection(layer, kind).name}; {family} has none"
    else:
        legal, reason = layout.expert_bias(layer) is not None, layout.no_projection(layer, kind)
    other: ProjectionKind = "attn" if kind == "mlp" else "mlp"
    if layout.bias_flag(layer, other) is not None and not _is_normalised(layout, layer, other):
        reason += f". A bias could hold a shift of {other}_out (extract.point: {other}_out)"
    return None if legal else reason


def _is_normalised(layout: Layout, layer: int, kind: ProjectionKind) -> bool:
    """True where a norm stands between the sublayer's output projection and the stream."""
    sublayer = layout.measured.sublayers[layer].get(kind)
    return sublayer is not None and sublayer.norm is not None


def bias_patch(program: Program, layout: Layout) -> WeightPatch:
    """The biases, and the config flags that make stock code build them."""
    biases: dict[str, Tensor] = {}
    flags: set[str] = set()
    for i in program.interventions:
        kind, name = _kind(i), layout.expert_bias(i.site.layer)
        if kind in layout.projection_kinds(i.site.layer) or name is None:
            projection = layout.output_projection(i.site.layer, kind)
            name = projection.name
            flags |= _missing_flags(layout, projection)
        # In a mixture whose router's weights sum to 1 it is the same b in every expert: sum_e w_e (f_e(x) + b).
        shift = i.coefficient * i.vector.float() / layout.sublayer(i.site.layer, kind).multiplier
        biases[name] = biases[name] + shift if name in biases else shift
    return WeightPatch(bias=biases, config_flags=tuple(sorted(flags)))


def _missing_flags(layout: Layout, projection: OutputProjection) -> set[str]:
    """The config flag that makes stock code build that projection's bias, where the model has none yet."""
    flag = layout.bias_flag(projection.layer, projection.kind)
    return set() if flag is None or flag == NATIVE else {flag}


# --------------------------------------------------------------------------------------- orthogonalise


def orthogonalise_refusal(program: Program, layout: Layout) -> str | None:
    """Why edits of output projections and embeddings cannot hold the canonical program, or None."""
    if program.interventions and all(i.operation == "add" for i in program.interventions):
        return "there is nothing to ablate; a shift is a bias"

    def refusal(i: Intervention, layout: Layout) -> str | None:
        layer, kind = i.site.layer, _kind(i)
        experts = None if kind in layout.projection_kinds(layer) else layout.no_projection(layer, kind)
        if i.operation == "add":
            return _shift_refusal(i, layout) if i.site == _EMBEDDINGS or experts is None else experts
        if "all" not in i.scopes:
            return f"weights act at every position, not at {i.positions} alone"
        if i.site == _EMBEDDINGS:
            return _embeddings_refusal(i, layout)
        if i.site.point in ("resid_pre", "resid_post"):
            return (
                "the stream there is a sum of what many output projections write; ablate at every one of them "
                "(see ablate_everywhere)"
            )
        if _is_normalised(layout, layer, kind):
            return f"{layout.model.config.model_type} normalises what its output projections write"
        if experts is None and not layout.sublayer(layer, kind).alone:
            experts = f"beside {layout.output_projection(layer, kind).name} routed experts write the stream there"
        return experts or (_shift_refusal(i, layout) if i.operation == "clamp" else None)

    return first_refusal(program, layout, refusal)


def _embeddings_refusal(intervention: Intervention, layout: Layout) -> str | None:
    """Why the embeddings cannot hold an edit of what enters block 0, or None."""
    if not layout.embeddings:
        return "what enters block 0 is not a sum of embeddings alone"
    can_hold = intervention.operation == "ablate"
    return None if can_hold else "embeddings can lose a direction, but a clamp's shift has no bias there"


def orthogonalise_adapter_refusal(program: Program, layout: Layout) -> str | None:
    """Why the result cannot be exported as a stock PEFT adapter, or None."""
    for i in program.interventions:
        if i.site == _EMBEDDINGS:
            return "it edits the embeddings, which a plain LoRA does not hold: merged checkpoint only"
        if i.operation != "ablate" or layout.output_projection(i.site.layer, _kind(i)).module.bias is not None:
            return NO_ADAPTER_BIAS
    return None


@dataclass
class _Affine:
    """The matrix [d_model, n] and bias [d_model] of a module after the edits so far, and the factors of their change."""

    weight: Tensor
    bias: Tensor
    B: list[Tensor] = field(default_factory=list)
    A: list[Tensor] = field(default_factory=list)


def orthogonalise(program: Program, layout: Layout) -> WeightPatch:
    """The edits of output projections and embeddings, and the biases that clamps and shifts need."""
    edited: dict[str, _Affine] = {}
    flags: set[str] = set()
    embeddings = layout.embeddings
    # A shift of the block's output comes after what happens at its sublayers, whatever the program's order.
    for i in sorted(program.interventions, key=lambda i: i.site.point == "resid_post"):
        projection = None if i.site == _EMBEDDINGS else layout.output_projection(i.site.layer, _kind(i))
        basis, shift = i.normal_form()
        for name in embeddings if projection is None else (projection.name,):
            if name not in edited:
                module = layout.model.get_submodule(name)
                # float64, so that many edits of one matrix in turn stay exact to float32's rounding
                with align_module_device(module):  # where it lies on disk
                    weight = cast(Tensor, module.weight).double()
                weight = weight.T if isinstance(module, nn.Embedding | Conv1D) else weight
                bias = getattr(module, "bias", None)
                edited[name] = _Affine(weight, weight.new_zeros(len(weight)) if bias is None else bias.double())
            affine = edited[name]
            if basis is not None:
                u = basis[:, 0].double().to(affine.weight.device)
                row = u @ affine.weight
                affine.weight = affine.weight - i.coefficient * torch.outer(u, row)
                affine.bias = affine.bias - i.coefficient * (u @ affine.bias) * u
                affine.B.append(-i.coefficient * u)
                affine.A.append(row)
            scale = 1.0 if projection is None else layout.sublayer(projection.layer, projection.kind).multiplier
            affine.bias = affine.bias + i.coefficient * shift.to(affine.bias) / scale
        if projection is not None and bool(shift.any()):
            flags |= _missing_flags(layout, projection)

    low_rank: dict[str, LowRank] = {}
    biases: dict[str, Tensor] = {}
    for name, affine in edited.items():
        if affine.B:
            B, A = torch.stack(affine.B, dim=1).float(), torch.stack(affine.A).float()
            low_rank[name] = LowRank(A.T, B.T) if name in embeddings else LowRank(B, A)  # stored [tokens, d_model]
        bias = getattr(layout.model.get_submodule(name), "bias", None)
        change = (affine.bias if bias is None else affine.bias - bias.double()).float()
        if bool(change.any()):
            biases[name] = change
    untie = layout.tied and any(name in embeddings for name in edited)
    return WeightPatch(low_rank, biases, tuple(sorted(flags)), untie)


# -------------------------------------------------------------------------------- convert_architecture


def convert_refusal(program: Program, layout: Layout) -> str | None:
    """Why the model cannot be rewritten so that a bias holds the canonical program, or None."""
    config = layout.model.config
    if config.model_type == _CONVERTED:
        return f"it is {_CONVERTED} already"
    if config.model_type not in _CONVERTIBLE:
        return (
            f"{config.model_type} is not one of the families that {_CONVERTED}'s stock code computes "
            f"({', '.join(_CONVERTIBLE)})"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its sliding window of {window} tokens is not in {_CONVERTED}'s stock code"
    return bias_refusal(program, replace(layout, flags=_CONVERTED_FLAGS))


def convert_architecture(program: Program, layout: Layout) -> WeightPatch:
    """The biases, with the architecture that holds them."""
    patch = bias_patch(program, replace(layout, flags=_CONVERTED_FLAGS))
    return replace(patch, architecture=_CONVERTED)
