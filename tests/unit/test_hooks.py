"""Reference semantics: hooks against a model's blocks that are run by hand, and the roles of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE, in_scope, prompt_roles, steered
from compile_steer.steering.program import Intervention
from compile_steer.steering.sites import POINTS, OperationName, Point, parse_positions
from tests.helpers.tiny import (
    CONFIGS,
    LAYERS,
    Padded,
    edit,
    intervention,
    loaded,
    logits,
    program,
    relative_error,
    texts,
)

POSITIONS = ("all", "prompt", "response", "last_prompt", "last_prompt+response")

# --------------------------------------------------------------------------- a llama written by hand

Edits = Mapping[tuple[int, Point], Callable[[Tensor], Tensor]]


def llama_by_hand(model: nn.Module, ids: Tensor, edits: Edits) -> Tensor:
    """Logits [time, vocab] of one unpadded row: attention, MLP and norms from the weights alone."""
    weights = dict(model.named_parameters())
    config = CONFIGS["llama"]
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    time = ids.shape[0]
    angles = torch.arange(time)[:, None] * 10_000.0 ** -(torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([wave, wave], dim=-1) for wave in (angles.cos(), angles.sin()))

    def norm(h: Tensor, name: str) -> Tensor:
        return weights[name] * h / (h.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def at(layer: int, point: Point, h: Tensor) -> Tensor:
        return edits[layer, point](h) if (layer, point) in edits else h

    h = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        h = at(layer, "resid_pre", h)
        x = norm(h, name + "input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{name}self_attn.{kind}_proj.weight"].T).view(time, -1, size).transpose(0, 1)
            for kind in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(heads // groups, dim=0) for each in (k, v))
        scores = q @ k.transpose(1, 2) / size**0.5
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        mixed_values = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(time, -1)
        h = h + at(layer, "attn_out", mixed_values @ weights[name + "self_attn.o_proj.weight"].T)
        x = norm(h, name + "post_attention_layernorm.weight")
        gate, up = (x @ weights[f"{name}mlp.{kind}_proj.weight"].T for kind in ("gate", "up"))
        h = h + at(layer, "mlp_out", (torch.nn.functional.silu(gate) * up) @ weights[name + "mlp.down_proj.weight"].T)
        h = at(layer, "resid_post", h)
    return norm(h, "model.norm.weight") @ weights["lm_head.weight"].T


def test_the_hand_written_llama_is_the_model() -> None:
    model = loaded("llama").model
    row = texts()[0]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([row.ids])).logits[0]
    assert relative_error(llama_by_hand(model, torch.tensor(row.ids), {}), expected) < 1e-5


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("operation", ["add", "ablate", "clamp"])
def test_each_operation_at_each_point_is_the_hand_written_one(operation: OperationName, point: Point) -> None:
    model = loaded("llama").model
    row = texts()[1]
    for layer in (0, 2, LAYERS - 1):
        action = intervention(operation, point, layer)
        by_hand = llama_by_hand(model, torch.tensor(row.ids), {(layer, point): partial(edit, action)})
        with steered(model, program("llama", action)):
            actual = logits(model, Padded.of([row], "right"))
        assert relative_error(actual, by_hand) < 1e-5
        assert relative_error(logits(model, Padded.of([row], "right")), by_hand) > 1e-3


def in_turn(first: Intervention, second: Intervention, h: Tensor) -> Tensor:
    return edit(second, edit(first, h))


def test_several_edits_at_a_site_run_in_the_program_s_order() -> None:
    model = loaded("llama").model
    row = texts()[1]
    push, stop = intervention(seed=1), intervention("clamp", seed=1)  # the same direction: they do not commute
    for first, second in ((push, stop), (stop, push)):
        both = partial(in_turn, first, second)
        by_hand = llama_by_hand(model, torch.tensor(row.ids), {(1, "resid_post"): both})
        with steered(model, program("llama", first, second)):
            assert relative_error(logits(model, Padded.of([row], "right")), by_hand) < 1e-5


def test_a_block_s_output_is_edited_before_the_next_block_s_input() -> None:
    model = loaded("llama").model
    row = texts()[1]
    push, stop = intervention("add", "resid_post", 1, seed=1), intervention("clamp", "resid_pre", 2, seed=1)
    by_hand = llama_by_hand(
        model,
        torch.tensor(row.ids),
        {(1, "resid_post"): partial(edit, push), (2, "resid_pre"): partial(edit, stop)},
    )
    for order in ((push, stop), (stop, push)):
        with steered(model, program("llama", *order)):
            assert relative_error(logits(model, Padded.of([row], "right")), by_hand) < 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_edit_acts_on_the_tokens_of_its_scope_alone(positions: str) -> None:
    model = loaded("llama").model
    row = texts()[1]
    in_words = {
        "all": range(len(row.ids)),
        "prompt": range(row.n_prompt),
        "response": range(row.n_prompt, len(row.ids)),
        "last_prompt": [row.n_prompt - 1],
        "last_prompt+response": range(row.n_prompt - 1, len(row.ids)),
    }[positions]
    chosen = torch.zeros(len(row.ids), 1, dtype=torch.bool)
    chosen[list(in_words)] = True
    action = intervention("clamp", "mlp_out", 1, positions=positions)
    by_hand = llama_by_hand(
        model, torch.tensor(row.ids), {(1, "mlp_out"): lambda h: torch.where(chosen, edit(action, h), h)}
    )
    batch = Padded.of([row], "right")
    with steered(model, program("llama", action), roles=batch.roles):
        assert relative_error(logits(model, batch), by_hand) < 1e-5


def test_hidden_states_that_transformers_captures_are_the_steered_ones() -> None:
    model = loaded("llama").model
    batch = Padded.of(texts(), "left")
    action = intervention(layer=1)
    with torch.no_grad():
        base = model(**batch.inputs, output_hidden_states=True).hidden_states
        with steered(model, program("llama", action)):
            actual = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(actual[1], base[1])
    real = batch.attention_mask.bool()
    assert relative_error(actual[2][real], edit(action, base[2][real])) < 1e-6


# ------------------------------------------------------------------------------------------- roles


def test_the_roles_of_prompts_do_not_depend_on_the_side_of_the_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert prompt_roles(mask).tolist() == [
        [PROMPT, PROMPT, LAST_PROMPT, PAD],
        [PAD, PROMPT, PROMPT, LAST_PROMPT],
        [PROMPT, PROMPT, PROMPT, LAST_PROMPT],
        [PAD, PAD, PAD, LAST_PROMPT],
        [PAD, PAD, PAD, PAD],
    ]


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("all", [False, True, True, True]),
        ("prompt", [False, True, True, False]),
        ("response", [False, False, False, True]),
        ("last_prompt", [False, False, True, False]),
        ("last_prompt+response", [False, False, True, True]),
    ],
)
def test_padding_is_in_no_scope_and_the_last_prompt_token_is_a_prompt_token(positions: str, chosen: list[bool]) -> None:
    roles = torch.tensor([[PAD, PROMPT, LAST_PROMPT, RESPONSE]], dtype=torch.int8)
    assert in_scope(roles, parse_positions(positions)).tolist() == [chosen]


def test_roles_of_another_batch_are_refused() -> None:
    model = loaded("llama").model
    batch = Padded.of(texts(), "right")
    with (
        steered(model, program("llama", intervention(positions="response")), roles=batch.roles[:, 1:]),
        pytest.raises(ArtifactError, match=r"roles are \[3, 9\] but the model runs \[3, 10\]"),
    ):
        logits(model, batch)
