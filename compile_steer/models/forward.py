"""Run a span of a model's blocks on hidden states of our choosing, through the model's own forward.

Steered and base model compute the same thing below the first intervened block, so extraction,
sweeps, calibration and distillation run that prefix once. Blocks outside the span hand their input
on unchanged while the model's own code still makes masks and position embeddings, so this holds for
every family without a copy of its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from compile_steer.steering.layout import Layout


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def run_blocks(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Run blocks start .. stop-1 and return what they hand on, [batch, time, d_model].

    Args:
        input_ids, attention_mask: [batch, time], right-padded; or a mask of what each token sees,
            [batch, 1, time, time], added to the attention scores.
        position_ids: [batch, time]; None counts from 0.
        start: the first block to run; above 0 it receives `hidden`, [batch, time, d_model].
        stop: the block before which to stop; the number of blocks stops before the final norm, None after it.

    Hooks that are on (a program, a patch) act inside the span as they would in a full pass.
    """
    layout = Layout.of(model)
    blocks = layout.blocks
    end = len(blocks) if stop is None else stop
    caught: list[Tensor] = []

    def hand_on(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    def catch(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        caught.append(hidden_states)
        return hidden_states

    def inject(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            if not start <= index < end:
                stack.enter_context(_forward_replaced(block, catch if index == end else hand_on))
        if stop == len(blocks):
            stack.callback(blocks[-1].register_forward_hook(lambda _m, _a, output: caught.append(output)).remove)
        if start > 0:
            handle = blocks[start].register_forward_pre_hook(inject, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        output = layout.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
    return caught[0] if caught else output.last_hidden_state


def lm_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [n, vocab] of final hidden states [n, d_model], with the family's own scaling and soft cap."""
    layout = Layout.of(model)
    final = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden.unsqueeze(0))
    final.router_logits = None  # read by the heads of mixtures of experts
    with _forward_replaced(layout.backbone, lambda *_args, **_kwargs: final):
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
        logits: Tensor = layout.model(input_ids=token, use_cache=False).logits
    return logits[0]
