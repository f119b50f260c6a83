"""Passes keep what a program does; the plan says what can lower it, and why the rest cannot."""

from __future__ import annotations

import pytest
import torch

from compile_steer.common.errors import CannotLower, RecipeError
from compile_steer.lowering.options import CalibrationOptions, CompileOptions
from compile_steer.lowering.plan import lower, plan
from compile_steer.models.text import Text
from compile_steer.steering.passes import canonical, drop_inactive, input_to_output, merge_shifts
from compile_steer.steering.program import Program
from tests.helpers.tiny import intervention, loaded, program


def sites(steering: Program) -> list[str]:
    return [f"{i.operation} {i.site}" for i in steering.interventions]


def test_what_is_off_or_zero_is_dropped() -> None:
    steering = program("llama", intervention(layer=0), intervention(layer=1), intervention(layer=2))
    assert sites(drop_inactive(steering.toggled(0, False).scaled(0.0, 2))) == ["add resid_post 1"]


def test_the_input_of_a_block_is_the_output_of_the_one_below_but_the_first_has_none_below() -> None:
    steering = program("llama", intervention(point="resid_pre", layer=0), intervention("ablate", "resid_pre", 3))
    assert sites(input_to_output(steering)) == ["add resid_pre 0", "ablate resid_post 2"]


def test_shifts_that_meet_are_one_shift_with_their_sum() -> None:
    first, second = intervention(seed=1, coefficient=1.7), intervention(seed=2, coefficient=-0.6)
    (merged,) = merge_shifts(program("llama", first, second)).interventions
    assert merged.coefficient == 1.0
    assert torch.allclose(merged.vector, 1.7 * first.vector - 0.6 * second.vector)


def test_shifts_apart_in_place_positions_or_order_stay_apart() -> None:
    for other in (intervention(layer=2), intervention(point="mlp_out"), intervention(positions="response")):
        assert len(merge_shifts(program("llama", intervention(seed=1), other)).interventions) == 2
    between = program("llama", intervention(seed=1), intervention("clamp", seed=1), intervention(seed=2))
    assert sites(merge_shifts(between)) == ["add resid_post 1", "clamp resid_post 1", "add resid_post 1"]


def test_positions_that_mean_the_same_meet() -> None:
    steering = program("llama", intervention(positions="prompt+response"), intervention(positions="all", seed=2))
    assert len(merge_shifts(steering).interventions) == 1


def test_a_block_s_output_is_edited_before_what_was_the_next_block_s_input() -> None:
    steering = program("llama", intervention("clamp", "resid_pre", 2), intervention("add", "resid_post", 1))
    assert sites(canonical(steering)) == ["add resid_post 1", "clamp resid_post 1"]


# --------------------------------------------------------------------------------------------- plan


def test_auto_takes_the_first_backend_that_does_not_refuse() -> None:
    exact = plan(program("llama", intervention()), loaded("llama").layout)
    assert exact.chosen == ["bias"]
    exact_first = ["bias", "orthogonalise", "retarget", "closed_form", "distill", "full", "full_cut"]
    assert [choice.backend for choice in exact.choices] == exact_first
    fitted = plan(program("gemma2", intervention()), loaded("gemma2").layout)
    assert fitted.chosen == ["closed_form"]
    assert "normalises" in (fitted.choices[0].refusal or "")
    assert plan(program("mistral", intervention()), loaded("mistral").layout).chosen == ["retarget"]
    ablated = program("mistral", intervention("ablate", "mlp_out"))
    assert plan(ablated, loaded("mistral").layout).chosen == ["orthogonalise"]


def test_pinned_backends_are_chosen_together() -> None:
    pinned = plan(program("llama", intervention()), loaded("llama").layout, ("bias", "distill"))
    assert pinned.chosen == ["bias", "distill"]


def test_a_plan_holds_the_program_in_canonical_form() -> None:
    steering = program("llama", intervention("add", "resid_pre", 2), intervention(coefficient=0.0))
    assert sites(plan(steering, loaded("llama").layout).program) == ["add resid_post 1"]


def test_a_pinned_backend_that_refuses_is_an_error_with_its_reason_and_what_to_use() -> None:
    steering = program("llama", intervention(positions="response"))
    with pytest.raises(CannotLower) as caught:
        plan(steering, loaded("llama").layout, ("closed_form", "bias"))
    assert caught.value.problems == (
        "bias: add at resid_post 1: a bias acts at every position, not at response alone.",
        "Use compile.backends: closed_form, distill, full, full_cut or auto.",
    )


def test_an_empty_program_cannot_be_lowered_by_any_backend() -> None:
    with pytest.raises(CannotLower, match="nothing to compile"):
        plan(program("llama", intervention(coefficient=0.0)), loaded("llama").layout)


def test_a_bias_cannot_be_exported_as_an_adapter() -> None:
    choices = {c.backend: c for c in plan(program("llama", intervention()), loaded("llama").layout).choices}
    assert "merged checkpoint only" in (choices["bias"].adapter_refusal or "")
    assert choices["closed_form"].adapter_refusal is None


def test_an_ablation_can_be_exported_as_an_adapter_unless_a_bias_or_the_embeddings_change_too() -> None:
    for family, steering, refused in (
        ("llama", intervention("ablate", "mlp_out"), False),
        ("gpt2", intervention("ablate", "mlp_out"), True),
        ("llama", intervention("clamp", "mlp_out"), True),
        ("llama", intervention("ablate", "resid_pre", 0), True),
    ):
        choices = plan(program(family, steering), loaded(family).layout, ("orthogonalise",)).choices
        assert [c.adapter_refusal is not None for c in choices if c.chosen] == [refused]


# ------------------------------------------------------------------------------------------- lowering


def test_a_program_a_model_and_options_are_enough_to_lower() -> None:
    steering, tiny = program("llama", intervention("add", "resid_pre", 2)), loaded("llama")
    assert lower(steering, tiny, ()).bias.keys() == {"model.layers.1.mlp.down_proj"}
    with pytest.raises(RecipeError, match=r"need 180 prompts, data.calibration has 1\."):
        lower(steering, tiny, [Text("w1 w2")], backend="closed_form")
    options = CompileOptions(calibration=CalibrationOptions(prompts=2, max_new_tokens=3))
    patch = lower(steering, tiny, [Text("w1 w2"), Text("w3")], options, backend="closed_form", seed=5)
    assert patch.low_rank["model.layers.1.mlp.down_proj"].rank == 1 + 8, "a neuron and a correction"
