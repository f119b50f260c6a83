"""Where the blocks of a model are, and which modules write its residual stream: measured on the model itself.

A module writes the stream if a constant that is added to its output comes out of its block as m times that constant,
at every token. Three things are read off by a few tokens:

1. The blocks: the list of modules that the forward pass runs one after another, each on what the one before it gave.
2. Of each kind of block, the modules that write the stream. Those after which nothing reads the stream any more pass at
   once; those that a later sublayer reads pass when that sublayer is held at what it gave before.
3. For every block, that the modules found on its kind pass the test there as well.

What does not pass is not assumed: the point is then missing from the layout, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import LayoutError

ProjectionKind = Literal["attn", "mlp"]
KINDS: tuple[ProjectionKind, ...] = ("attn", "mlp")

_TOKENS = 8
# Of the norm of what comes out. In float32 a true writer leaves 1e-6 and the nearest false one 5e-2; in bf16 a true one 8e-3.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_COARSE_TOLERANCE = 3e-2


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
        reason: why there is no projection.
    """

    point: str
    projection: str | None = None
    norm: str | None = None
    multiplier: float = 1.0
    alone: bool = True
    expert_bias: str | None = None
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
    """

    blocks: str
    sublayers: tuple[Mapping[ProjectionKind, Sublayer], ...]
    embeddings: tuple[str, ...]
    d_model: int


def measure(model: PreTrainedModel) -> Measured:
    """Measure the layout of a causal language model with three passes over 8 tokens.

    Raises:
        LayoutError: the property that a decoder of residual blocks has and this model lacks.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            calls = _record_blocks(model)
            kinds: dict[tuple[object, ...], _Found] = {}
            sublayers = []
            for call in calls.blocks:
                signature = tuple((name, type(m).__name__) for name, m in call.block.named_modules())
                if signature not in kinds:
                    kinds[signature] = _sublayers(call)
                sublayers.append(_proved(call, kinds[signature], _constants(model.config)))
            return Measured(
                calls.name, tuple(sublayers), _embeddings(model, calls), calls.blocks[0].reference.shape[-1]
            )
    finally:
        model.train(training)


# ------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Call:
    """One call of a block that can be made again, with the output [2, tokens, d_model] that it gave."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reference: Tensor

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """The output of the block under the hooks that are on now, on its own input or on `hidden`."""
        args, kwargs = self.args, self.kwargs
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs = {**kwargs, "hidden_states": hidden}
        return _stream(self.block(*args, **kwargs))

    @property
    def hidden(self) -> Tensor:
        """The block's input."""
        value = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class _Calls:
    name: str
    blocks: list[_Call]
    input_ids: Tensor


def _stream(output: Any) -> Tensor:
    """The hidden state of a module's output: blocks and attention modules of some models return a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    return first if isinstance(first, Tensor) else torch.empty(0)


def _record_blocks(model: PreTrainedModel) -> _Calls:
    """Run two rows that differ in their last token once, and find the list of blocks; checks that it is causal."""
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(True for _ in block.parameters()) for block in module)
    }
    owner = {block: (name, index) for name, blocks in lists.items() for index, block in enumerate(blocks)}
    seen: dict[str, list[tuple[int, _Call]]] = {}
    with ExitStack() as stack:
        for block in owner:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                name, index = owner[module]
                seen.setdefault(name, []).append((index, _Call(module, args, kwargs, _stream(output).clone())))

            stack.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        input_ids = _token_ids(model)
        run_backbone(model, input_ids)
    chains = {name: [call for _, call in calls] for name, calls in seen.items() if _is_chain(calls, len(lists[name]))}
    if not chains:
        raise LayoutError(
            f"{type(model).__name__} has no list of residual blocks that run one after another, each on the output of the "
            "one before it, so there is no stream to steer."
        )
    name = max(chains, key=lambda name: sum(p.numel() for block in lists[name] for p in block.parameters()))
    blocks = chains[name]
    last = blocks[-1].reference
    if _differ(last[0, :-1], last[1, :-1], last.dtype):
        raise LayoutError(
            f"{type(model).__name__} reads later tokens: changing the last one changes the hidden states before it. Only "
            "causal language models (decoders) can be compiled."
        )
    return _Calls(name, blocks, input_ids)


def _token_ids(model: PreTrainedModel) -> Tensor:
    """Two rows of token ids [2, 8] that differ in the last one, spread over the vocabulary."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.linspace(vocabulary * 0.1, vocabulary * 0.9, _TOKENS, device=model.device).long()
    rows = torch.stack([ids, ids])
    rows[1, -1] = rows[1, 0]
    return rows


def run_backbone(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """One pass of the whole model without a cache."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)


def _is_chain(calls: Sequence[tuple[int, _Call]], count: int) -> bool:
    """True if every block was called once, in order, on what the block before it gave."""
    if [index for index, _ in calls] != list(range(count)):
        return False
    blocks = [call for _, call in calls]
    shapes = {call.reference.shape for call in blocks}
    has_input = all(call.args or "hidden_states" in call.kwargs for call in blocks)
    if len(shapes) != 1 or blocks[0].reference.dim() != 3 or not has_input:
        return False
    inputs = [call.args[0] if call.args else call.kwargs["hidden_states"] for call in blocks]
    if not all(isinstance(value, Tensor) and value.shape == blocks[0].reference.shape for value in inputs):
        return False
    return all(torch.equal(after, before.reference) for before, after in zip(blocks, inputs[1:], strict=False))


def _embeddings(model: PreTrainedModel, calls: _Calls) -> tuple[str, ...]:
    """The embeddings outside of the blocks to whose output an added constant moves the input of block 0 alike."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not name.startswith(f"{calls.name}.")
    ]
    first, found = calls.blocks[0], []
    for name in names:
        inputs: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"]).clone())  # noqa: B023 - called within this turn
            raise _Stopped

        delta = _delta(first.hidden)
        with ExitStack() as stack:
            module = model.get_submodule(name)
            if module.weight.shape[1] != len(delta):
                continue
            stack.callback(module.register_forward_hook(lambda _m, _a, out, delta=delta: out + delta).remove)
            stack.callback(first.block.register_forward_pre_hook(stop, with_kwargs=True).remove)
            with suppress(_Stopped):
                run_backbone(model, calls.input_ids)
        if inputs and _multiple(inputs[0] - first.hidden, delta) is not None:
            found.append(name)
    return tuple(found)


class _Stopped(Exception):
    """Ends a pass early."""


# ---------------------------------------------------------------------------------------------- sublayers


def _delta(reference: Tensor) -> Tensor:
    """A fixed random constant [d_model] as large as a typical token of `reference` [..., d_model]."""
    generator = torch.Generator().manual_seed(0)
    # The median token: the first one's norm is hundreds of times that of the others in many models.
    size = reference.reshape(-1, reference.shape[-1]).float().square().mean(dim=1).sqrt().median()
    delta = torch.randn(reference.shape[-1], generator=generator).to(reference.device) * size.clamp(min=1e-6)
    return delta.to(reference.dtype)


def _multiple(change: Tensor, delta: Tensor) -> float | None:
    """m where `change` [..., d_model] is m times `delta` at every token, to rounding; else None."""
    rows, direction = change.reshape(-1, len(delta)).double(), delta.double()
    factors = (rows @ direction) / (direction @ direction)
    m = float(factors.median())
    # Tokens whose own size drowns the constant in rounding (the first one, in many models) have no say.
    errors = (rows - m * direction).norm(dim=1) / direction.norm()
    tolerance = _TOLERANCE.get(delta.dtype, _COARSE_TOLERANCE) * max(1.0, abs(m))
    return m if abs(m) > 1e-3 and float(errors.quantile(0.75)) < tolerance else None


def _differ(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    scale = right.float().norm().clamp(min=1e-12)
    return float((left - right).float().norm() / scale) > _TOLERANCE.get(dtype, _COARSE_TOLERANCE) / 10


@contextmanager
def _shifted(module: nn.Module, delta: Tensor) -> Iterator[None]:
    """Add `delta` to the module's output inside the block."""

    def shift(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = module.register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _held(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Hold the module's output at `value` inside the block."""

    def hold(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        held = value.clone()  # some blocks add to it in place
        return (held, *output[1:]) if isinstance(output, tuple) else held

    handle = module.register_forward_hook(hold)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Trace:
    """What the modules of a block gave, and what they read, in one call; in the order in which they ran."""

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]


def _trace(call: _Call) -> _Trace:
    trace, shared = _Trace({}, {}), set[str]()
    with ExitStack() as stack:
        for name, module in call.block.named_modules():
            # A LoRA wraps the Linear: its inner layers are not the module that stock code has there.
            if name and not {"base_layer", "lora_A", "lora_B"} & set(name.split(".")):

                def keep(_m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                    if name in trace.outputs:  # two sublayers share it, so it is not the point of either
                        shared.add(name)
                    trace.outputs[name] = _stream(output).clone()
                    if args and isinstance(args[0], Tensor):
                        trace.inputs[name] = args[0].clone()

                stack.callback(module.register_forward_hook(keep).remove)
        call.run()
    for name in shared:
        del trace.outputs[name]
    return trace


@dataclass(frozen=True)
class _Found:
    """The sublayers of a kind of block, and the names of all modules that write the stream after each has been read."""

    sublayers: Mapping[ProjectionKind, Sublayer]
    late: Sequence[str]


def _sublayers(call: _Call) -> _Found:
    """The sublayers of one block, by the two tests of this module's docstring."""
    if _differ(call.run(), call.reference, call.reference.dtype):
        raise LayoutError(f"a {type(call.block).__name__} does not give the same output when it is run again.")
    trace, delta = _trace(call), _delta(call.reference)
    size = call.reference.numel()
    candidates = [n for n, out in trace.outputs.items() if out.shape[-1:] == delta.shape and out.numel() == size]
    late = {name: m for name in candidates if (m := _factor(call, trace, name)) is not None}
    rest = [name for name in candidates if name not in late]
    early = {name: m for name in rest if (m := _factor(call, trace, name, list(late))) is not None}
    leaves = _distinct(trace, [*_leaves(late), *_leaves(early)])
    writers = {**late, **early}
    mixing = {}
    for name in leaves:
        # All that writes beside it: neither what it lies in nor what lies in it.
        beside = [other for other in writers if not _within(other, name) and not _within(name, other)]
        mixing[name] = _mixes_tokens(call, trace, name, beside)
    found: dict[ProjectionKind, Sublayer] = {}
    for kind in KINDS:
        chosen = [name for name in leaves if mixing[name] == (kind == "attn")]
        sublayer = _sublayer(call, trace, chosen, writers) if chosen else None
        if sublayer is not None:
            found[kind] = sublayer
    return _Found(found, list(late))


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _factor(call: _Call, trace: _Trace, name: str, held: Sequence[str] = ()) -> float | None:
    """m where a constant at that module comes out of the block m times; `held` modules give what they gave before."""
    delta = _delta(call.reference)
    with ExitStack() as stack:
        for other in held:
            stack.enter_context(_held(call.block.get_submodule(other), trace.outputs[other]))
        stack.enter_context(_shifted(call.block.get_submodule(name), delta))
        return _multiple(call.run() - call.reference, delta)


def _leaves(writers: Mapping[str, float]) -> list[str]:
    """The writers that hold no other one."""
    return [name for name in writers if not any(other.startswith(f"{name}.") for other in writers)]


def _distinct(trace: _Trace, leaves: Sequence[str]) -> list[str]:
    """The leaves without those that hand on what another one gave (a dropout), in the order in which they ran."""
    distinct: list[str] = []
    for name in sorted(leaves, key=list(trace.outputs).index):
        if not any(torch.equal(trace.outputs[name], trace.outputs[other]) for other in distinct):
            distinct.append(name)
    return distinct


def _mixes_tokens(call: _Call, trace: _Trace, name: str, held: Sequence[str]) -> bool:
    """True if what the module gives for a token depends on the token before it, with the other writers held."""
    disturbed = call.hidden.clone()
    # The last but one, for a convolution sees a few tokens only.
    disturbed[:, -2] = disturbed[:, -2].flip(-1) + _delta(call.hidden)
    with ExitStack() as stack:
        for other in held:
            stack.enter_context(_held(call.block.get_submodule(other), trace.outputs[other]))
        outputs: list[Tensor] = []
        handle = call.block.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: outputs.append(_stream(out).clone())
        )
        stack.callback(handle.remove)
        call.run(disturbed)
    before, after = (value.reshape(call.reference.shape)[:, -1] for value in (trace.outputs[name], outputs[-1]))
    return _differ(after, before, before.dtype)


def _sublayer(call: _Call, trace: _Trace, leaves: Sequence[str], writers: Mapping[str, float]) -> Sublayer | None:
    """The sublayer that writes the stream through `leaves`; None where no one module gives all that they write."""
    points = [name for name in writers if all(_within(leaf, name) for leaf in leaves)]
    if len(points) > 1:  # an output with its batch and time, if one has them
        points = [name for name in points if trace.outputs[name].dim() == 3] or points
    if not points:
        return None
    point = max(points, key=len)  # the innermost
    modules = {name: call.block.get_submodule(name) for name in leaves}
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
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


def _linear_before(call: _Call, trace: _Trace, name: str) -> str | None:
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
    return not _differ(module(torch.ones_like(x)).float() * x.float() / rms, module(x).float(), torch.bfloat16)


def _expert_bias(call: _Call, point: str) -> str | None:
    """The parameter [n_experts, d_model] of a mixture that shifts what it writes by itself, if every expert has the same."""
    delta = _delta(call.reference)
    for name, parameter in call.block.get_submodule(point).named_parameters():
        if name.endswith("bias") and parameter.dim() == 2 and parameter.shape[1] == len(delta):
            before = parameter.data.clone()
            parameter.data += delta
            change = call.run() - call.reference
            parameter.data.copy_(before)
            factor = _multiple(change, delta)
            if factor is not None and abs(factor - 1) < 1e-2:
                return f"{point}.{name}"
    return None


def _constants(config: Any) -> list[float]:
    """The numbers of a config, which a multiplier is one of."""
    values = config.get_text_config().to_dict().values()
    return [1.0, *(value for value in values if isinstance(value, float) and value)]


def _proved(call: _Call, found: _Found, constants: Sequence[float]) -> dict[ProjectionKind, Sublayer]:
    """Those of the sublayers, found on another block of the same kind, that pass the test on this one."""
    passed: dict[ProjectionKind, Sublayer] = {}
    trace = _trace(call)
    tolerance = _TOLERANCE.get(call.reference.dtype, _COARSE_TOLERANCE)
    for kind, sublayer in found.sublayers.items():
        factor = _factor(call, trace, sublayer.point, () if sublayer.point in found.late else found.late)
        if factor is not None:
            # Exactly as the config has it, not as rounding left it.
            near = min(constants, key=lambda value: abs(value - factor))
            passed[kind] = replace(sublayer, multiplier=near if abs(near - factor) < tolerance * abs(near) else factor)
    return passed
