"""The program: what it accepts, and its algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import OPERATIONS, Site, parse_positions
from tests.helpers.tiny import HIDDEN, intervention, program, revision, vector


def three() -> Program:
    """One intervention of each operation, at three sites."""
    return program(
        "llama",
        intervention("add", "resid_pre", 2, positions="last_prompt+response", seed=1),
        intervention("clamp", "attn_out", 1, positions="prompt", seed=2),
        intervention("ablate", "mlp_out", 3, seed=3),
    )


def same(actual: Program, expected: Program) -> bool:
    def values(i: Intervention) -> tuple[Any, ...]:
        return i.site, i.operation, i.coefficient, i.positions, i.scopes, i.projection, i.enabled

    return (
        (actual.model, actual.revision) == (expected.model, expected.revision)
        and [values(i) for i in actual.interventions] == [values(i) for i in expected.interventions]
        and all(
            torch.equal(a.vector, b.vector) for a, b in zip(actual.interventions, expected.interventions, strict=True)
        )
    )


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("text", "scopes"),
    [
        ("all", {"all"}),
        ("response", {"response"}),
        (" last_prompt + response ", {"last_prompt", "response"}),
        ("prompt+response", {"all"}),
        ("last_prompt+all", {"all"}),
    ],
)
def test_positions_parse_and_what_covers_every_token_becomes_all(text: str, scopes: set[str]) -> None:
    assert parse_positions(text) == scopes


@pytest.mark.parametrize("text", ["", "responses", "all+", "last prompt"])
def test_unknown_positions_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ArtifactError, match="use all, prompt, response, last_prompt, joined by"):
        parse_positions(text)


# -------------------------------------------------------------------------------------- interventions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "rotate"}, "operation 'rotate' is unknown; use one of add, ablate, clamp"),
        ({"vector": torch.ones(2, 3)}, r"shape \[2, 3\]"),
        ({"vector": torch.arange(4)}, "torch.int64; needed"),
        ({"vector": torch.tensor([1.0, math.nan])}, "NaN or infinity"),
        ({"vector": torch.tensor([1.0, math.inf])}, "NaN or infinity"),
        ({"operation": "ablate"}, "'ablate' needs a unit direction; found norm 2.5"),
        ({"operation": "clamp", "projection": 2.0}, "'clamp' needs a unit direction; found norm 2.5"),
        ({"operation": "clamp", "vector": vector(0, 1.0)}, "'clamp' needs a projection"),
        ({"projection": 2.0}, "only 'clamp' takes one"),
        ({"coefficient": math.nan}, "coefficient nan is not a finite number"),
        ({"coefficient": math.inf}, "coefficient inf is not a finite number"),
    ],
)
def test_an_intervention_that_cannot_run_is_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"site": Site(1), "operation": "add", "vector": vector(0), **changes}
    with pytest.raises(ArtifactError, match=message):
        Intervention(**arguments)


@pytest.mark.parametrize("projection", [math.nan, math.inf])
def test_a_clamp_to_no_number_is_refused(projection: float) -> None:
    with pytest.raises(ArtifactError, match="projection"):
        Intervention(Site(1), "clamp", vector(0, 1.0), 0.7, projection=projection)


def test_every_problem_of_an_intervention_is_reported_at_once() -> None:
    with pytest.raises(ArtifactError) as caught:
        Intervention(Site(2, "mlp_out"), "ablate", vector(0), math.nan, projection=3.0)
    assert len(caught.value.problems) == 3
    assert all(problem.startswith("intervention at mlp_out 2: ") for problem in caught.value.problems)


def test_a_site_below_the_first_block_or_at_no_known_point_is_refused() -> None:
    with pytest.raises(ArtifactError, match="layer -1 is negative"):
        Site(-1)
    with pytest.raises(ArtifactError, match="choose one of resid_pre, attn_out, mlp_out, resid_post"):
        Site(1, "resid_mid")  # type: ignore[arg-type]  # no such point, on purpose


def test_the_normal_form_of_each_operation_is_the_one_in_the_design() -> None:
    add, ablate, clamp = (intervention(name, seed=4) for name in OPERATIONS)
    basis, shift = add.normal_form()
    assert basis is None
    assert torch.equal(shift, add.vector)
    basis, shift = ablate.normal_form()
    assert basis is not None
    assert torch.equal(basis[:, 0], ablate.vector)
    assert not shift.any()
    basis, shift = clamp.normal_form()
    assert basis is not None
    assert torch.equal(basis[:, 0], clamp.vector)
    assert torch.equal(shift, -1.9 * clamp.vector)


def test_a_description_names_coefficient_site_and_state() -> None:
    text = three().toggled(1, False).describe().splitlines()
    assert text[0] == "add +1.7 at resid_pre 2, positions last_prompt+response, ||c v|| = 4.25"
    assert text[1] == "clamp (projection -1.9) +1.02 at attn_out 1, positions prompt [off]"
    assert text[2] == "ablate (projection 0) +1.02 at mlp_out 3, positions all"


# ------------------------------------------------------------------------------------------ algebra


def test_a_program_scales_as_a_whole_or_by_one_intervention() -> None:
    whole = 2.5 * three()
    assert [i.coefficient for i in whole.interventions] == pytest.approx([4.25, 2.55, 2.55])
    assert [i.coefficient for i in (three() * 2.5).interventions] == [i.coefficient for i in whole.interventions]
    scaled = three().scaled(2.5, index=1)
    assert [i.coefficient for i in scaled.interventions] == pytest.approx([1.7, 2.55, 1.02])
    last = three().scaled(2.5, index=-1)
    assert [i.coefficient for i in last.interventions] == pytest.approx([1.7, 1.02, 2.55])


def test_minus_a_program_negates_its_coefficients_and_twice_is_the_program() -> None:
    assert [i.coefficient for i in (-three()).interventions] == pytest.approx([-1.7, -1.02, -1.02])
    assert same(-(-three()), three())


def test_an_index_that_does_not_exist_is_an_error_and_not_ignored() -> None:
    with pytest.raises(IndexError):
        three().scaled(2.0, index=3)
    with pytest.raises(IndexError):
        three().toggled(3, False)


def test_a_toggled_intervention_keeps_its_coefficient() -> None:
    off = three().toggled(0, False)
    assert [i.operation for i in off.active] == ["clamp", "ablate"]
    assert off.interventions[0].coefficient == 1.7
    assert same(off.toggled(0, True), three())


def test_what_has_coefficient_zero_is_not_active() -> None:
    assert [i.operation for i in three().scaled(0.0, index=1).active] == ["add", "ablate"]


def test_a_sum_runs_the_left_program_first() -> None:
    left, right = program("llama", intervention(seed=1)), program("llama", intervention("ablate", seed=2))
    assert [i.operation for i in (left + right).interventions] == ["add", "ablate"]
    assert [i.operation for i in (right + left).interventions] == ["ablate", "add"]


def test_the_first_changed_block_is_the_one_below_an_edited_input() -> None:
    assert program("llama", intervention("add", "resid_pre", 2), intervention("add", "mlp_out", 3)).first_layer == 1
    assert program("llama", intervention("add", "resid_pre", 0)).first_layer == 0
    assert program("llama", intervention(layer=1), intervention(layer=3)).toggled(0, False).first_layer == 3


def test_interventions_of_different_widths_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"widths \[16, 32\]"):
        program("llama", intervention(), Intervention(Site(2), "add", vector(1, width=16)))


# -------------------------------------------------------------------------------------- another model


def test_programs_of_two_models_do_not_add() -> None:
    with pytest.raises(
        ArtifactError, match="made for 'tiny-gpt2', revision sha256:tiny-gpt2; found 'tiny-llama', .*: other weights"
    ):
        program("llama", intervention()) + program("gpt2", intervention())


def test_another_revision_width_or_depth_is_refused_with_every_reason() -> None:
    with pytest.raises(ArtifactError) as caught:
        three().require("tiny-llama", "sha256:other", d_model=48, n_layers=3)
    text = str(caught.value)
    assert (
        f"made for 'tiny-llama', revision {revision('llama')}; found 'tiny-llama', revision sha256:other: other weights"
        in text
    )
    assert text.count(f"has width {HIDDEN}; the model has 48") == 3
    assert "layer 3 does not exist: the model has blocks 0 to 2" in text
    assert caught.value.problems[-1].startswith("Extract the vector from this model")


def test_the_model_it_was_made_for_is_accepted() -> None:
    three().require("tiny-llama", revision("llama"), d_model=HIDDEN, n_layers=4)
    with pytest.raises(ArtifactError):
        three().require("tiny-llama", revision("llama"), d_model=HIDDEN, n_layers=3)


def test_a_constant_is_what_is_added_to_every_token_alone() -> None:
    unit = torch.tensor([1.0, 0.0])
    added = Intervention(Site(1), "add", unit)
    ablated, answers = Intervention(Site(2), "ablate", unit), Intervention(Site(1), "add", unit, positions="response")
    steering = Program((added, ablated), "m", "r")
    assert steering.at_block(1) == (added,) and steering.at_block(0) == ()
    assert [steering.adds_constant(block) for block in range(3)] == [False, True, False]
    assert not Program((added, answers), "m", "r").adds_constant(1)


def test_where_a_constant_is_added_is_told_where_that_is_all_that_changes_in_the_block() -> None:
    unit = torch.tensor([1.0, 0.0])
    answers = Intervention(Site(1), "add", unit, positions="response")
    others = {
        "add": (Intervention(Site(1), "add", unit, positions="prompt"),),
        "ablate": (Intervention(Site(1), "ablate", unit, positions="response"),),
        "all": (Intervention(Site(1), "add", unit),),
    }
    assert [Program((answers,), "m", "r").adds_to(block) for block in range(3)] == [set(), {"response"}, set()]
    assert Program((answers, answers), "m", "r").adds_to(1) == {"response"}
    assert all(not Program((answers, *other), "m", "r").adds_to(1) for other in others.values())
    assert not Program(others["all"], "m", "r").adds_to(1)
    assert Program((answers, *others["all"]), "m", "r").by_role and not Program(others["all"], "m", "r").by_role
