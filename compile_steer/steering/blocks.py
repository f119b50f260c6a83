"""The blocks of a model: finding them in one pass of the whole model, and running one again by itself.

The blocks are the list of modules that the forward pass runs one after another, each on what the one before it gave.
A block that was called once can be called again under hooks on the modules inside it, without the rest of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compile_steer.common.errors import LayoutError, library_errors
from compile_steer.steering.compare import delta_of, differ, multiple

_TOKENS = 8


@dataclass(frozen=True)
class Call:
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
        name = type(self.block).__name__
        with library_errors(lambda reason: LayoutError(f"a {name} cannot be run by itself ({reason}).")):
            return stream(self.block(*args, **kwargs))

    @property
    def hidden(self) -> Tensor:
        """The block's input."""
        value = self.args[0] if self.args else self.kwargs["hidden_states"]
        assert isinstance(value, Tensor)
        return value


@dataclass(frozen=True)
class Calls:
    """The calls of a model's blocks, in order; `name` is the list's, `input_ids` [2, tokens] what the pass read."""

    name: str
    blocks: list[Call]
    input_ids: Tensor


def stream(output: Any) -> Tensor:
    """The hidden state of a module's output: blocks and attention modules of some models return a tuple."""
    first = output[0] if isinstance(output, tuple | list) else output
    return first if isinstance(first, Tensor) else torch.empty(0)


def with_first(output: Any, hidden: Tensor) -> Any:
    """A module's output with `hidden` in the place of its hidden state."""
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def record_blocks(model: PreTrainedModel) -> Calls:
    """Run two rows that differ in their last token once, and find the list of blocks; checks that it is causal."""
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(True for _ in block.parameters()) for block in module)
    }
    owner = {block: (name, index) for name, blocks in lists.items() for index, block in enumerate(blocks)}
    seen: dict[str, list[tuple[int, Call]]] = {}
    with ExitStack() as stack:
        for block in owner:

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                name, index = owner[module]
                seen.setdefault(name, []).append((index, Call(module, args, kwargs, stream(output).clone())))

            stack.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
        input_ids = token_ids(model)
        name = type(model).__name__
        with library_errors(lambda reason: LayoutError(f"{name} does not run on token ids alone ({reason}).")):
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
    if not bool(torch.isfinite(last).all()):
        raise LayoutError(
            f"{type(model).__name__} in {str(last.dtype).removeprefix('torch.')} computes NaN or infinity on {_TOKENS} tokens. "
            "Load it in float32; if it is so there, the weights are damaged."
        )
    if differ(last[0, :-1], last[1, :-1], last.dtype):
        raise LayoutError(
            f"{type(model).__name__} reads later tokens: changing the last one changes the hidden states before it. Only "
            "causal language models (decoders) can be compiled."
        )
    return Calls(name, blocks, input_ids)


def input_device(module: nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Where a model or block computes: accelerate keeps it where it has spread the weights, which may lie on disk."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = otherwise or next(module.parameters()).device
    return torch.device(device)


def token_ids(model: PreTrainedModel) -> Tensor:
    """Two rows of token ids [2, 8] that differ in the last one, spread over the vocabulary."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise LayoutError(
            f"{type(model).__name__} has no one table of token embeddings, so it does not read texts alone."
        )
    vocabulary = len(weight)
    ids = torch.linspace(vocabulary * 0.1, vocabulary * 0.9, _TOKENS, device=input_device(model)).long()
    rows = torch.stack([ids, ids])
    rows[1, -1] = rows[1, 0]
    return rows


def run_backbone(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """One pass of the whole model without a cache."""
    return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)


def _is_chain(calls: Sequence[tuple[int, Call]], count: int) -> bool:
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
    # NaN where a weight has overflowed: said below, with its own reason.
    pairs = zip(blocks, inputs[1:], strict=False)
    return all(torch.equal(after.nan_to_num(), before.reference.nan_to_num()) for before, after in pairs)


def embeddings(model: PreTrainedModel, calls: Calls) -> tuple[str, ...]:
    """The embeddings that make the input of block 0 by their sum; none where something else is in it too.

    One is among them if a constant that is added to its output moves that input alike.
    """
    first = calls.blocks[0]
    delta, names = delta_of(first.hidden), []
    for name, module in model.named_modules():
        inside = name.startswith(f"{calls.name}.")
        if isinstance(module, nn.Embedding) and not inside and module.weight.shape[1] == len(delta):
            with shifted(module, delta):
                change = _first_input(model, calls) - first.hidden
            if multiple(change, delta) is not None:
                names.append(name)
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(_silenced(model.get_submodule(name)))
        # Sines of the position, say, are in no matrix that could be edited.
        rest = _first_input(model, calls)
    return tuple(names) if not bool(rest.any()) else ()


def _first_input(model: PreTrainedModel, calls: Calls) -> Tensor:
    """The input of block 0 under the hooks that are on now."""
    inputs: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).clone())
        raise _Stopped

    handle = calls.blocks[0].block.register_forward_pre_hook(stop, with_kwargs=True)
    with suppress(_Stopped):
        run_backbone(model, calls.input_ids)
    handle.remove()
    return inputs[0]


def backbone(model: PreTrainedModel, calls: Calls) -> str:
    """The outermost module around the blocks that the model's forward calls (some reach past `base_model` for its decoder)."""
    parts, called = calls.name.split("."), list[str]()
    with ExitStack() as stack:
        for name in (".".join(parts[:n]) for n in range(1, len(parts))):
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name)).remove)
        _first_input(model, calls)
    return called[0] if called else model.base_model_prefix


@contextmanager
def _silenced(module: nn.Module) -> Iterator[None]:
    """The module gives zeros inside the block."""
    handle = module.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


class _Stopped(Exception):
    """Ends a pass early."""


# ---------------------------------------------------------------------------- running one again


@contextmanager
def shifted(module: nn.Module, delta: Tensor) -> Iterator[None]:
    """Add `delta` to the module's output inside the block."""

    def shift(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return with_first(output, stream(output) + delta)

    handle = module.register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def holding(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Hold the module's output at `value` inside the block."""

    def hold(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return with_first(output, value.clone())  # some blocks add to it in place

    handle = module.register_forward_hook(hold)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Trace:
    """What the modules of a block gave, and what they read, in one call; in the order in which they ran."""

    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]


def record_trace(call: Call) -> Trace:
    """Run the block again and keep what its modules gave, without those that ran twice."""
    trace, shared = Trace({}, {}), set[str]()
    with ExitStack() as stack:
        for name, module in call.block.named_modules():
            # A LoRA wraps the Linear: its inner layers are not the module that stock code has there.
            if name and not {"base_layer", "lora_A", "lora_B"} & set(name.split(".")):

                def keep(_m: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                    if name in trace.outputs:  # two sublayers share it, so it is not the point of either
                        shared.add(name)
                    trace.outputs[name] = stream(output).clone()
                    if args and isinstance(args[0], Tensor):
                        trace.inputs[name] = args[0].clone()

                stack.callback(module.register_forward_hook(keep).remove)
        call.run()
    for name in shared:
        del trace.outputs[name]
    return trace
