"""Where the blocks of a model are, and which modules write its residual stream: measured on the model itself.

A module writes the stream if a constant that is added to its output comes out of its block as m times that constant,
at every token. Three things are read off by a few tokens:

1. The blocks: the list of modules that the forward pass runs one after another, each on what the one before it gave.
2. Of each kind of block, the modules that write the stream. Those after which nothing reads the stream any more pass at
   once; those that a later sublayer reads pass when that sublayer is held at what it gave before, and so on backwards.
3. For every block, that the modules found on its kind pass the test there as well.

What does not pass is not assumed: the point is then missing from the layout, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import LayoutError
from compile_steer.steering.blocks import (
    Call,
    Trace,
    backbone,
    embeddings,
    holding,
    record_blocks,
    record_trace,
    shifted,
    stream,
)
from compile_steer.steering.compare import delta_of, differ, multiple, tolerance_of

ProjectionKind = Literal["attn", "mlp"]
KINDS: tuple[ProjectionKind, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class Sublayer:
    """What writes the stream in one sublayer of a block; module names are relative to the block.

    Attributes:
        point: the module whose output, times `multiplier`, is added to the stream.
        projection: the Linear (or Conv1D) that writes `point`'s output, or what the norm before it reads; None in a
            mixture of experts, which has no such matrix.
        norm: the RMS norm between projection and stream, in a post-norm model.
        multiplier: the constant that the block multiplies the output by (1 in most models).
        alone: nothing but the projection writes the point (a shared expert does beside the routed ones).
        expert_bias: the parameter [n_experts, d_model] of a mixture that is added to every token with weights that sum to 1.
        last: nothing else in the block reads the stream after it, so that a shift there is one of the block's output.
        reason: why there is no projection.
    """

    point: str
    projection: str | None = None
    norm: str | None = None
    multiplier: float = 1.0
    alone: bool = True
    expert_bias: str | None = None
    last: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """The layout of a model.

    Attributes:
        blocks: the name of the list of blocks.
        sublayers: of each block, by kind: "attn" for what moves information between tokens (attention, linear attention,
            state space, convolution), "mlp" for what reads each token alone.
        embeddings: the names of the modules that make the input of block 0.
        d_model: the width of the stream.
        backbone: the name of the module around the blocks whose output the head reads.
        outputs: how many values a block returns, the stream first; 0 where it is no tuple.
    """

    blocks: str
    sublayers: tuple[Mapping[ProjectionKind, Sublayer], ...]
    embeddings: tuple[str, ...]
    d_model: int
    backbone: str
    outputs: int


def measure(model: PreTrainedModel) -> Measured:
    """Measure the layout of a causal language model with three passes over 8 tokens.

    Raises:
        LayoutError: the property that a decoder of residual blocks has and this model lacks.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            calls = record_blocks(model)
            kinds: dict[tuple[object, ...], _Kind] = {}
            sublayers = []
            for call in calls.blocks:
                signature = tuple((name, type(m).__name__) for name, m in call.block.named_modules())
                if signature not in kinds:
                    kinds[signature] = _sublayers(call)
                sublayers.append(_proved(call, kinds[signature], _constants(model.config)))
            first = calls.blocks[0]
            raw = first.block(*first.args, **first.kwargs)
            return Measured(
                calls.name,
                tuple(sublayers),
                embeddings(model, calls),
                first.reference.shape[-1],
                backbone(model, calls),
                len(raw) if isinstance(raw, tuple | list) else 0,
            )
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Kind:
    """The sublayers of a kind of block, and the modules behind each that read what it wrote, which its test holds."""

    sublayers: Mapping[ProjectionKind, Sublayer]
    held: Mapping[ProjectionKind, Sequence[str]]


def _sublayers(call: Call) -> _Kind:
    """The sublayers of one block, by the two tests of this module's docstring."""
    if differ(call.run(), call.reference, call.reference.dtype):
        raise LayoutError(f"a {type(call.block).__name__} does not give the same output when it is run again.")
    trace, delta = record_trace(call), delta_of(call.reference)
    size = call.reference.numel()
    candidates = [n for n, out in trace.outputs.items() if out.shape[-1:] == delta.shape and out.numel() == size]
    rounds: list[dict[str, float]] = []  # the last sublayer's writers first
    writers: dict[str, float] = {}
    while passed := {n: m for n in candidates if n not in writers and (m := _factor(call, trace, n, list(writers)))}:
        rounds.append(passed)
        writers |= passed
    leaves = _distinct(trace, [leaf for passed in rounds for leaf in _leaves(passed)])
    mixing = {}
    for name in leaves:
        # All that writes beside it: neither what it lies in nor what lies in it.
        beside = [other for other in writers if not _within(other, name) and not _within(name, other)]
        mixing[name] = _mixes_tokens(call, trace, name, beside)
    sublayers: dict[ProjectionKind, Sublayer] = {}
    held: dict[ProjectionKind, list[str]] = {}
    for kind in KINDS:
        # Where two are of a kind (Gemma 4 adds its per-layer inputs behind the MLP), it is the one that comes first.
        for number, passed in enumerate(rounds):
            chosen = [name for name in leaves if name in passed and mixing[name] == (kind == "attn")]
            sublayer = _sublayer(call, trace, chosen, writers) if chosen else None
            if sublayer is not None:
                sublayers[kind] = replace(sublayer, last=number == 0)
                held[kind] = [name for later in rounds[:number] for name in later]
    return _Kind(sublayers, held)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _factor(call: Call, trace: Trace, name: str, held: Sequence[str] = ()) -> float | None:
    """m where a constant at that module comes out of the block m times; `held` modules give what they gave before."""
    delta = delta_of(call.reference)
    with ExitStack() as stack:
        for other in held:
            stack.enter_context(holding(call.block.get_submodule(other), trace.outputs[other]))
        stack.enter_context(shifted(call.block.get_submodule(name), delta))
        return multiple(call.run() - call.reference, delta)


def _leaves(writers: Mapping[str, float]) -> list[str]:
    """The writers that hold no other one."""
    return [name for name in writers if not any(other.startswith(f"{name}.") for other in writers)]


def _distinct(trace: Trace, leaves: Sequence[str]) -> list[str]:
    """The leaves without those that hand on what another one gave (a dropout), in the order in which they ran."""
    distinct: list[str] = []
    for name in sorted(leaves, key=list(trace.outputs).index):
        if not any(torch.equal(trace.outputs[name], trace.outputs[other]) for other in distinct):
            distinct.append(name)
    return distinct


def _mixes_tokens(call: Call, trace: Trace, name: str, held: Sequence[str]) -> bool:
    """True if what the module gives for a token depends on the token before it, with the other writers held."""
    disturbed = call.hidden.clone()
    # The last but one, for a convolution sees a few tokens only.
    disturbed[:, -2] = disturbed[:, -2].flip(-1) + delta_of(call.hidden)
    with ExitStack() as stack:
        for other in held:
            stack.enter_context(holding(call.block.get_submodule(other), trace.outputs[other]))
        outputs: list[Tensor] = []
        handle = call.block.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: outputs.append(stream(out).clone())
        )
        stack.callback(handle.remove)
        call.run(disturbed)
    before, after = (value.reshape(call.reference.shape)[:, -1] for value in (trace.outputs[name], outputs[-1]))
    return differ(after, before, before.dtype)


def _sublayer(call: Call, trace: Trace, leaves: Sequence[str], writers: Mapping[str, float]) -> Sublayer | None:
    """The sublayer that writes the stream through `leaves`; None where no one module gives all that they write."""
    points = [name for name in writers if all(_within(leaf, name) for leaf in leaves)]
    if len(points) > 1:  # an output with its batch and time, if one has them
        points = [name for name in points if trace.outputs[name].dim() == 3] or points
    if not points:
        return None
    point = max(points, key=len)  # the innermost
    modules = {name: call.block.get_submodule(name) for name in leaves}
    linears = [
        name
        for name, module in modules.items()
        # A matrix whose output is scaled in another way than the point's is not written through like it.
        if isinstance(module, nn.Linear | Conv1D) and abs(writers[name] - writers[point]) < 1e-2 * abs(writers[point])
    ]
    sublayer = Sublayer(point, multiplier=writers[point])
    if linears:
        # Beside experts a shared one may write through a matrix of its own.
        return replace(sublayer, projection=linears[0], alone=len(leaves) == 1)
    source = _linear_before(call, trace, point) if len(leaves) == 1 else None
    if source is not None and _is_rms_norm(call.block.get_submodule(point), trace.inputs[point]):
        return replace(sublayer, projection=source, norm=point)
    if source is not None:
        return replace(
            sublayer, reason=f"{type(modules[point]).__name__}, which is no RMS norm, stands behind {source}"
        )
    return replace(sublayer, expert_bias=_expert_bias(call, point))


def _linear_before(call: Call, trace: Trace, name: str) -> str | None:
    """The Linear whose output that module reads as it is."""
    read = trace.inputs.get(name)
    for other, output in reversed(trace.outputs.items()):
        is_linear = isinstance(call.block.get_submodule(other), nn.Linear | Conv1D)
        if read is not None and is_linear and output.shape == read.shape and torch.equal(output, read):
            return other
    return None


def _is_rms_norm(module: nn.Module, read: Tensor) -> bool:
    """True if the module gives weights * x / rms(x)."""
    # Of a typical size, so that the norm's epsilon has no share.
    x = torch.randn(read.shape, generator=torch.Generator().manual_seed(0)).to(read)
    rms = x.float().square().mean(dim=-1, keepdim=True).sqrt()
    return not differ(module(torch.ones_like(x)).float() * x.float() / rms, module(x).float(), torch.bfloat16)


def _expert_bias(call: Call, point: str) -> str | None:
    """The parameter [n_experts, d_model] of a mixture that shifts what it writes by itself, if every expert has the same."""
    delta = delta_of(call.reference)
    for name, parameter in call.block.get_submodule(point).named_parameters():
        if name.endswith("bias") and parameter.dim() == 2 and parameter.shape[1] == len(delta):
            before = parameter.data.clone()
            parameter.data += delta
            change = call.run() - call.reference
            parameter.data.copy_(before)
            factor = multiple(change, delta)
            if factor is not None and abs(factor - 1) < 1e-2:
                return f"{point}.{name}"
    return None


def _constants(config: Any) -> list[float]:
    """The numbers of a config, which a multiplier is one of."""
    values = config.get_text_config().to_dict().values()
    return [1.0, *(value for value in values if isinstance(value, float) and value)]


def _proved(call: Call, block_kind: _Kind, constants: Sequence[float]) -> dict[ProjectionKind, Sublayer]:
    """Those of the sublayers, found on another block of the same kind, that pass the test on this one."""
    passed: dict[ProjectionKind, Sublayer] = {}
    trace = record_trace(call)
    tolerance = tolerance_of(call.reference.dtype)
    for kind, sublayer in block_kind.sublayers.items():
        held = block_kind.held[kind]
        factor = _factor(call, trace, sublayer.point, held)
        if factor is None:
            continue
        # Behind a norm it is the norm that writes; a shared expert's matrix is not the point itself, so it is tried too.
        if sublayer.projection not in (None, sublayer.point) and sublayer.norm is None:
            written = _factor(call, trace, sublayer.projection, held)
            if written is None or abs(written - factor) > tolerance * abs(factor):
                sublayer = replace(sublayer, projection=None)
        # Exactly as the config has it, not as rounding left it.
        near = min(constants, key=lambda value: abs(value - factor))
        passed[kind] = replace(sublayer, multiplier=near if abs(near - factor) < tolerance * abs(near) else factor)
    return passed
