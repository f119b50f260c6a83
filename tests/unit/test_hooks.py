"""Reference semantics: hooks against the model's blocks run by hand, positions, padding, cache and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from compile_steer.common.errors import ArtifactError, LayoutError
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE, in_scope, prompt_roles, steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import POINTS, OperationName, Point, Site, parse_positions
from tests.helpers.tiny import (
    CONFIGS,
    FAMILIES,
    HIDDEN,
    LAYERS,
    REVISION,
    VOCAB,
    Padded,
    build,
    edit,
    intervention,
    loaded,
    logits,
    n_hooks,
    program,
    random_patch,
    relative_error,
    texts,
    vector,
)

POSITIONS = ("all", "prompt", "response", "last_prompt", "last_prompt+response")
# One intervention a point, over three blocks and all operations.
MIXED: tuple[tuple[OperationName, Point, int], ...] = (
    ("add", "resid_pre", 2),
    ("clamp", "attn_out", 1),
    ("ablate", "mlp_out", 2),
    ("add", "resid_post", 0),
)


def mixed(family: str, positions: str) -> Program:
    return program(
        family,
        *(intervention(op, point, layer, positions=positions, seed=n) for n, (op, point, layer) in enumerate(MIXED)),
    )


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
        steered(model, mixed("llama", "response"), roles=batch.roles[:, 1:]),
        pytest.raises(ArtifactError, match=r"roles are \[3, 9\] but the model runs \[3, 10\]"),
    ):
        logits(model, batch)


# ------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("family", FAMILIES)
def test_left_and_right_padding_and_single_rows_agree(family: str) -> None:
    model = loaded(family).model
    rows = texts()
    for positions in POSITIONS:
        actual = {}
        for side in ("left", "right"):
            batch = Padded.of(rows, side)
            with steered(model, mixed(family, positions), roles=batch.roles):
                actual[side] = logits(model, batch)
        alone = []
        for row in rows:
            single = Padded.of([row], "right")
            with steered(model, mixed(family, positions), roles=single.roles):
                alone.append(logits(model, single))
        assert relative_error(actual["left"], torch.cat(alone)) < 1e-5
        assert relative_error(actual["right"], torch.cat(alone)) < 1e-5


# -------------------------------------------------------------------------------- cached generation


def generated(model: Any, prompts: Padded, steps: int, *, use_cache: bool = True) -> tuple[Tensor, Tensor]:
    """Greedy tokens [batch, steps] and their raw logits [batch, steps, vocab]."""
    output = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        use_cache=use_cache,
    )
    return output.sequences[:, -steps:], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_one_pass_over_all_with_explicit_roles(family: str) -> None:
    model, steps = loaded(family).model, 7
    prompts = Padded.of(texts(((5, 0), (2, 0), (4, 0))), "left")
    outcomes = []
    for positions in POSITIONS:
        steering = mixed(family, positions)
        with steered(model, steering):
            tokens, cached = generated(model, prompts, steps)
            again, uncached = generated(model, prompts, steps, use_cache=False)
        assert torch.equal(again, tokens)
        assert relative_error(uncached, cached) < 2e-5
        whole = Padded(
            torch.cat([prompts.input_ids, tokens], dim=1),
            torch.cat([prompts.attention_mask, torch.ones_like(tokens)], dim=1),
            torch.cat([prompts.position_ids, prompts.position_ids[:, -1:] + 1 + torch.arange(steps)], dim=1),
            torch.cat([prompts.roles, torch.full_like(tokens, RESPONSE, dtype=torch.int8)], dim=1),
        )
        with steered(model, steering, roles=whole.roles), torch.no_grad():
            forced = model(**whole.inputs).logits[:, -steps - 1 : -1]
        assert relative_error(cached, forced) < 2e-5
        outcomes.append(cached)
    differences = [relative_error(a, b) for n, a in enumerate(outcomes) for b in outcomes[n + 1 :]]
    assert min(differences) > 1e-3, "two scopes gave the same logits, so the test tells nothing"


# -------------------------------------------------------------------------------- programs by row


def by_row(family: str) -> list[Program]:
    """Programs of one shape: other vectors and doses, one of them the base."""
    parts: tuple[tuple[OperationName, Point], ...] = (("add", "attn_out"), ("clamp", "mlp_out"), ("add", "resid_post"))
    programs = [
        program(
            family,
            *(
                intervention(op, point, 1, positions="last_prompt+response", coefficient=c, seed=10 * row + n)
                for n, (op, point) in enumerate(parts)
            ),
        )
        for row, c in enumerate((1.7, -0.8, 2.3))
    ]
    return [programs[0], programs[1].scaled(0.0), programs[2].toggled(1, True)]


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gpt2"])
def test_programs_in_the_rows_of_a_batch_equal_separate_runs(family: str) -> None:
    model = loaded(family).model
    rows, programs = texts(), by_row(family)
    batch = Padded.of(rows, "left")
    with steered(model, programs, roles=batch.roles), torch.no_grad():
        together = batch.rows(model(**batch.inputs).logits)
    for row, steering, actual in zip(rows, programs, together, strict=True):
        single = Padded.of([row], "right")
        with steered(model, steering, roles=single.roles):
            assert relative_error(actual, logits(model, single)) < 1e-5


def test_programs_in_the_rows_of_a_batch_generate_what_separate_runs_do() -> None:
    model = loaded("granite").model
    rows, programs = texts(((5, 0), (2, 0), (4, 0))), by_row("granite")
    with steered(model, programs):
        tokens, actual = generated(model, Padded.of(rows, "left"), 5)
    for at, (row, steering) in enumerate(zip(rows, programs, strict=True)):
        with steered(model, steering):
            alone, expected = generated(model, Padded.of([row], "left"), 5)
        assert relative_error(actual[at], expected[0]) < 2e-5
        assert tokens[at].tolist() == alone[0].tolist()


def test_rows_that_do_not_share_a_shape_are_refused() -> None:
    model = loaded("llama").model
    steering = program("llama", intervention())
    refused = {
        "same number of interventions": [steering, program("llama", intervention(), intervention(layer=2))],
        "must share sites": [steering, program("llama", intervention(layer=2))],
        "share sites, operations and positions": [steering, program("llama", intervention(positions="response"))],
        "sites, operations": [program("llama", intervention("ablate")), program("llama", intervention("clamp"))],
    }
    for message, programs in refused.items():
        with pytest.raises(ArtifactError, match=message), steered(model, programs):
            raise AssertionError("not refused")


def test_more_or_fewer_programs_than_rows_are_refused() -> None:
    model = loaded("llama").model
    programs = [program("llama", intervention(seed=n)) for n in range(3)]
    for rows in (texts()[:1], texts()[:2]):
        with steered(model, programs), pytest.raises(ArtifactError, match="rows|programs"):
            logits(model, Padded.of(rows, "right"))


# ---------------------------------------------------------------------------------- refusals, leaving


def test_another_width_or_a_missing_block_is_refused_before_any_hook() -> None:
    model = loaded("llama").model
    narrow = Program((Intervention(Site(1), "add", vector(0, width=16)),), "tiny-llama", REVISION)
    deep = program("llama", intervention(layer=1), intervention(layer=LAYERS))
    before = n_hooks(model)
    for wrong, message in ((narrow, f"width 16; the model has {HIDDEN}"), (deep, "blocks 0 to 3")):
        with pytest.raises(ArtifactError, match=message), steered(model, wrong):
            raise AssertionError("not refused")
    assert n_hooks(model) == before


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with (
        pytest.raises(LayoutError, match=r"'opt' \(OPTForCausalLM\) is not known. Known: gemma2, gemma3_text, gpt2"),
        steered(opt(), program("opt", intervention())),
    ):
        raise AssertionError("not refused")


def opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    model: nn.Module = OPTForCausalLM(config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_the_block_takes_every_hook_away_even_after_an_error(family: str) -> None:
    model = loaded(family).model
    batch = Padded.of(texts(), "right")
    before, base = n_hooks(model), logits(model, batch)
    every = program(family, *(intervention("clamp", point, n) for n, point in enumerate(POINTS)))
    with steered(model, every):
        assert n_hooks(model) > before
        assert relative_error(logits(model, batch), base) > 1e-3
    assert n_hooks(model) == before
    assert torch.equal(logits(model, batch), base)
    with pytest.raises(ZeroDivisionError), steered(model, every):
        raise ZeroDivisionError
    assert n_hooks(model) == before
    assert torch.equal(logits(model, batch), base)


def test_what_is_switched_off_changes_no_bit() -> None:
    model = loaded("llama").model
    batch = Padded.of(texts(), "right")
    base = logits(model, batch)
    off = mixed("llama", "all").toggled(0, False).scaled(0.0, 1).toggled(2, False).scaled(0.0, 3)
    with steered(model, off):
        assert torch.equal(logits(model, batch), base)


def test_a_model_wrapped_by_peft_is_steered_in_the_same_way() -> None:
    patch = random_patch(loaded("llama"))
    batch = Padded.of(texts(), "left")
    merged, wrapped = build("llama"), build("llama")
    adapted = get_peft_model(wrapped, LoraConfig(r=3, lora_alpha=3, target_modules=sorted(patch.low_rank))).eval()
    weights = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, low_rank in patch.low_rank.items():
            full = low_rank.padded(3)
            merged.get_parameter(f"{name}.weight").add_(full.B @ full.A)
            weights[f"base_model.model.{name}.lora_A.default.weight"].copy_(full.A)
            weights[f"base_model.model.{name}.lora_B.default.weight"].copy_(full.B)
    with steered(merged, mixed("llama", "response"), roles=batch.roles):
        expected = logits(merged, batch)
    assert relative_error(logits(merged, batch), expected) > 1e-3
    with steered(adapted, mixed("llama", "response"), roles=batch.roles):
        assert relative_error(logits(adapted, batch), expected) < 1e-5
