"""`bias`: a constant shift at every position is a bias of the block's writer. Exact.

resid_post k: h + c v = h_mid + m * (W x + b),  b = c v / m,  m the family's residual multiplier

In a mixture of experts whose router's weights sum to 1 it is the same b in every expert: sum_e w_e (f_e(x) + b).
"""

from __future__ import annotations

from torch import Tensor

from compile_steer.lower.job import Job, first_refusal
from compile_steer.steering.layout import EXPERTS, Layout, OutputProjection, ProjectionKind
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site


def refusal(program: Program, layout: Layout) -> str | None:
    """Why this backend cannot hold the (canonical) program in stock weights, or None."""
    return first_refusal(program, layout, _refusal)


def _refusal(one: Intervention, layout: Layout) -> str | None:
    return shift_refusal(one, layout) if one.operation == "add" else f"a bias cannot {one.operation}; it only shifts"


def shift_refusal(one: Intervention, layout: Layout) -> str | None:
    """Why no stock bias can hold the shift of one intervention, or None."""
    if "all" not in one.scopes:
        return f"a bias acts at every position, not at {one.positions} alone"
    if one.site == Site(0, "resid_pre"):
        return "no writer lies below block 0"
    if layout.post_norm:
        return f"{layout.model.config.model_type} normalises what its writers write, so a bias is not a shift of the stream"
    kind = _writer(one)
    if kind in layout.projection_kinds:
        return _writer_refusal(one, layout, kind)
    if layout.family.expert_bias is None:
        point = "attn_out"
        instead = (
            "" if layout.bias_flag("attn") is None else f" (a shift of {point} could be held: extract.point: {point})"
        )
        return f"the MLP is {EXPERTS}{instead}"
    return None


def _writer_refusal(one: Intervention, layout: Layout, kind: ProjectionKind) -> str | None:
    """Why the matrix that writes there has no stock bias, or None."""
    writer, switch = layout.output_projection(one.site.layer, kind), layout.bias_flag(kind)
    if switch is None or (switch == "native" and not layout.has_bias(writer)):
        other: ProjectionKind = "attn" if kind == "mlp" else "mlp"
        point = "attn_out" if other == "attn" else "mlp_out"
        instead = (
            "" if layout.bias_flag(other) is None else f", but could hold a shift of {point} (extract.point: {point})"
        )
        return f"needs a bias on {writer.name}; {layout.model.config.model_type} has none{instead}"
    return None


def _writer(one: Intervention) -> ProjectionKind:
    return "attn" if one.site.point == "attn_out" else "mlp"


def adapter_refusal(_program: Program, _layout: Layout) -> str | None:
    """Why the result cannot ship as a stock PEFT adapter."""
    return "a LoRA on a Linear without a bias cannot hold one (PEFT refuses to merge it): merged checkpoint only"


def flags_for(layout: Layout, writer: OutputProjection) -> set[str]:
    """The config flag that makes stock code build that writer's bias, where the model has none yet."""
    switch = layout.bias_flag(writer.kind)
    return set() if switch is None or layout.has_bias(writer) else {switch}


def shifts(program: Program, layout: Layout) -> WeightPatch:
    """Return the biases and the config flags that make stock code build them."""
    biases: dict[str, Tensor] = {}
    flags: set[str] = set()
    for one in program.interventions:
        kind, name = _writer(one), layout.expert_bias(one.site.layer)
        if kind in layout.projection_kinds or name is None:
            writer = layout.output_projection(one.site.layer, kind)
            name = writer.name
            flags |= flags_for(layout, writer)
        shift = one.coefficient * one.vector.float() / layout.residual_multiplier
        biases[name] = biases[name] + shift if name in biases else shift
    return WeightPatch(bias=biases, config_flags=tuple(sorted(flags)))


def lower(job: Job) -> WeightPatch:
    """Return the biases that hold the program."""
    return shifts(job.program, job.loaded.layout)
