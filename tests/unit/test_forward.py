"""Replay: a pass cut into spans is the whole pass, in every family, with and without steering."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_steer.models.forward import lm_head, run_blocks
from compile_steer.steering.hooks import steered
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import with_patch
from compile_steer.steering.program import Program
from tests.helpers.captures import blocks_of, captured, n_hooks
from tests.helpers.tiny import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    Padded,
    build,
    intervention,
    loaded,
    logits,
    program,
    random_patch,
    relative_error,
    texts,
)


def steering(family: str) -> Program:
    """Acts in every block but the last, on some tokens only, at every point."""
    return program(
        family,
        intervention("add", "resid_pre", 0, positions="response", seed=1),
        intervention("clamp", "attn_out", 1, positions="prompt", seed=2),
        intervention("ablate", "mlp_out", 2, seed=3),
        intervention("add", "resid_pre", 2, positions="last_prompt+response", seed=4),
    )


def span(model: nn.Module, batch: Padded, **bounds: Any) -> Tensor:
    with torch.no_grad():
        return run_blocks(model, batch.input_ids, batch.attention_mask, **bounds)


def final_states(model: nn.Module, batch: Padded) -> Tensor:
    """What the head reads, from the model's own pass."""
    with torch.no_grad():
        output = Layout.of(model).backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    states: Tensor = output.last_hidden_state
    return states


@pytest.mark.parametrize("steer", [False, True], ids=["base", "steered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_split_at_any_block_is_the_whole_pass(family: str, steer: bool) -> None:
    model = loaded(family).model
    batch = Padded.of(texts(), "right")
    with steered(model, steering(family), roles=batch.roles) if steer else nullcontext():
        whole = final_states(model, batch)
        assert torch.equal(span(model, batch), whole)
        for split in range(1, LAYERS):
            below = span(model, batch, stop=split)
            assert torch.equal(span(model, batch, start=split, hidden=below), whole)
            for middle in range(split + 1, LAYERS):
                between = span(model, batch, start=split, stop=middle, hidden=below)
                assert torch.equal(span(model, batch, start=middle, hidden=between), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_span_hands_on_is_the_next_block_s_input(family: str) -> None:
    model = loaded(family).model
    batch = Padded.of(texts(), "right")
    with captured(family, model) as streams:
        final_states(model, batch)
    for stop in range(LAYERS):
        assert torch.equal(span(model, batch, stop=stop), streams.before[stop])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_span_that_stops_after_the_last_block_gives_its_output_and_not_the_norm_s(family: str) -> None:
    """`stop` is a block boundary like any other; only None asks for the final norm."""
    model = loaded(family).model
    batch = Padded.of(texts(), "right")
    with captured(family, model) as streams:
        final_states(model, batch)
    assert torch.equal(span(model, batch, stop=LAYERS), streams.after[LAYERS - 1])


def test_blocks_outside_the_span_are_not_run() -> None:
    model = build("llama")
    batch = Padded.of(texts(), "right")
    ran: list[int] = []
    for layer, block in enumerate(blocks_of("llama", model)):
        block.get_submodule("mlp").register_forward_hook(lambda *_args, layer=layer: ran.append(layer))
    span(model, batch, start=1, stop=3, hidden=torch.ones(3, batch.input_ids.shape[1], HIDDEN))
    assert ran == [1, 2]


def test_another_hidden_state_at_the_start_changes_what_comes_out() -> None:
    model = loaded("llama").model
    batch = Padded.of(texts(), "right")
    below = span(model, batch, stop=2)
    moved = span(model, batch, start=2, hidden=1.5 * below + 0.3)
    assert relative_error(moved, span(model, batch, start=2, hidden=below)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_acts_inside_a_span_as_in_a_full_pass(family: str) -> None:
    one = loaded(family)
    batch = Padded.of(texts(), "right")
    base = final_states(one.model, batch)
    with with_patch(one.model, random_patch(one)):
        whole = final_states(one.model, batch)
        below = span(one.model, batch, stop=2)
        assert torch.equal(span(one.model, batch, start=2, hidden=below), whole)
    assert relative_error(whole, base) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_readout_of_the_final_states_is_the_model_s_logits(family: str) -> None:
    model = loaded(family).model
    batch = Padded.of(texts(), "right")
    states = torch.cat(batch.rows(span(model, batch)))
    assert relative_error(lm_head(model, states), logits(model, batch)) < 1e-6


def test_readout_and_spans_let_gradients_through() -> None:
    model = loaded("gemma2").model
    batch = Padded.of(texts(), "right")
    hidden = span(model, batch, stop=2).requires_grad_()
    final = run_blocks(model, batch.input_ids, batch.attention_mask, start=2, hidden=hidden)
    lm_head(model, final[0]).square().mean().backward()
    assert hidden.grad is not None
    assert float(hidden.grad[0].abs().max()) > 0
    assert not hidden.grad[1:].any(), "the other rows were not read out"


def test_a_span_leaves_the_model_as_it_was_even_after_an_error() -> None:
    model = loaded("gpt_neox").model
    batch = Padded.of(texts(), "right")
    before, base = n_hooks(model), logits(model, batch)
    span(model, batch, start=1, stop=2, hidden=torch.ones(3, 10, HIDDEN))
    lm_head(model, torch.ones(2, HIDDEN))
    with pytest.raises(RuntimeError):
        span(model, batch, start=1, hidden=torch.ones(3, 10, HIDDEN + 1))
    assert n_hooks(model) == before
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert torch.equal(logits(model, batch), base)
