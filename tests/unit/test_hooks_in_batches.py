"""Hooks over batches: padding on either side, cached generation, a program a row, refusals, leaving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel

from compile_steer.common.errors import ArtifactError, LayoutError
from compile_steer.steering.hooks import RESPONSE, steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import POINTS, OperationName, Point, Site
from tests.helpers.captures import n_hooks
from tests.helpers.tiny import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    VOCAB,
    Padded,
    build,
    intervention,
    loaded,
    logits,
    program,
    random_patch,
    relative_error,
    revision,
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
    """Programs of one shape: other vectors and coefficients, one of them the base."""
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
    narrow = Program((Intervention(Site(1), "add", vector(0, width=16)),), "tiny-llama", revision("llama"))
    deep = program("llama", intervention(layer=1), intervention(layer=LAYERS))
    before = n_hooks(model)
    for wrong, message in ((narrow, f"width 16; the model has {HIDDEN}"), (deep, "blocks 0 to 3")):
        with pytest.raises(ArtifactError, match=message), steered(model, wrong):
            raise AssertionError("not refused")
    assert n_hooks(model) == before


def test_a_model_that_reads_later_tokens_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    message = "BertLMHeadModel reads later tokens.*Only causal language models"
    with pytest.raises(LayoutError, match=message), steered(BertLMHeadModel(config), program("llama", intervention())):
        raise AssertionError("not refused")


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
