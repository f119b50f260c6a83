"""The approximate backends on tiny models: how much of KL(steered || base) they take away on held-out texts.

Random models are harder than trained ones: the inputs of a gated MLP's down projection have hardly any mean there.
"""

from __future__ import annotations

import pytest
import torch

from compile_steer.common.errors import CompileSteerError
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.options import ClosedFormOptions, ClosedFormStage, CompileOptions
from compile_steer.lowering.plan import BACKENDS
from compile_steer.lowering.post_norm import norm_weights, regression_targets
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention
from tests.helpers.captures import n_hooks
from tests.helpers.fitting import (
    CALIBRATION,
    FAMILIES,
    HELD_OUT,
    TRAINING,
    canonical_program,
    kl,
    remaining_kl,
    solve,
    stages_of,
)
from tests.helpers.tiny import HIDDEN, LAYERS, Padded, intervention, loaded, logits

# --------------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize(
    ("family", "attn_out", "resid_post", "resid_pre", "clamp"),
    [
        ("llama", 0.06, 0.12, 0.16, 0.14),
        ("gpt2", 0.001, 0.001, 0.02, 0.001),
        ("gemma2", 0.20, 0.25, 0.38, 0.25),
        ("granite", 0.02, 0.04, 0.05, 0.06),
    ],
)
def test_the_default_stages_take_most_of_the_divergence_away(
    family: str, attn_out: float, resid_post: float, resid_pre: float, clamp: float
) -> None:
    tiny = loaded(family)
    for limit, intervened in (
        (attn_out, intervention("add", "attn_out", 1)),
        (resid_post, intervention("add", "resid_post", 1)),
        (resid_pre, intervention("add", "resid_pre", 0)),
        (clamp, intervention("clamp", "mlp_out", 1)),
    ):
        steering = canonical_program(family, intervened)
        assert remaining_kl(tiny, steering, solve(tiny, steering, stages_of(tiny, steering))) < limit


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("llama", 0.1),
        ("gpt2", 0.01),
        ("gemma2", 0.36),
        ("granite", 0.05),
        ("phi", 0.03),
        ("gpt_neox", 0.03),
        ("phi3", 0.12),
    ],
)
def test_the_last_block_s_output_is_matched_before_the_final_norm(family: str, limit: float) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention("add", "resid_post", LAYERS - 1))
    stages = [Stage(LAYERS - 1, "attn", 8), Stage(LAYERS - 1, "mlp", 8)]
    assert remaining_kl(tiny, steering, solve(tiny, steering, stages)) < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_for_the_response_alone_is_imitated_in_part(family: str) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention(positions="response"))
    assert remaining_kl(tiny, steering, solve(tiny, steering, stages_of(tiny, steering))) < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_corrects_what_the_ones_before_it_left(family: str) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention("add", "attn_out", 1))
    stages = stages_of(tiny, steering)[:4]
    left = [remaining_kl(tiny, steering, solve(tiny, steering, stages[:n])) for n in range(1, len(stages) + 1)]
    assert len(left) == 4
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 * left[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_is_the_program_s_and_not_another_s(family: str) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention())
    patch = solve(tiny, steering, stages_of(tiny, steering))
    right = remaining_kl(tiny, steering, patch)
    assert remaining_kl(tiny, -steering, patch) > 1.0, "the opposite program"
    assert remaining_kl(tiny, canonical_program(family, intervention(seed=5)), patch) > 3 * right, "another vector"
    flipped = {name: type(edit)(-edit.B, edit.A) for name, edit in patch.low_rank.items()}
    assert remaining_kl(tiny, steering, WeightPatch(flipped)) > 1.0, "the sign flipped"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_shift_of_a_block_gives_a_patch_of_rank_one_whatever_rank_is_given(family: str) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention())
    patch = solve(tiny, steering, [Stage(1, "mlp", 8)])
    ((name, edit),) = patch.low_rank.items()
    assert name == tiny.layout.output_projection(1, "mlp").name
    rank = 1 if tiny.layout.norm(1, "mlp") else 8  # in front of a norm, what is rounding alone is left out
    assert (tuple(edit.B.shape), tuple(edit.A.shape)) == ((32, rank), (rank, 48))
    assert (edit.B.dtype, edit.A.dtype) == (torch.float32, torch.float32)
    sizes = torch.linalg.svdvals(edit.B @ edit.A)
    assert float(sizes[1] / sizes[0]) < 1e-3


def test_solving_leaves_the_model_as_it_was() -> None:
    tiny = loaded("gpt2")
    batch = Padded.of(HELD_OUT, "right")
    before, base = n_hooks(tiny.model), logits(tiny.model, batch)
    solve(tiny, canonical_program("gpt2", intervention()), [Stage(1, "attn", 2), Stage(2, "mlp", 2)])
    assert n_hooks(tiny.model) == before
    assert torch.equal(logits(tiny.model, batch), base)


def test_one_text_is_enough_or_refused_with_a_reason() -> None:
    tiny = loaded("llama")
    steering = canonical_program("llama", intervention())
    try:
        patch = solve(tiny, steering, [Stage(1, "mlp", 2)], TRAINING[:1])
    except CompileSteerError as error:
        assert "calibration" in str(error)
    else:
        patch.require_finite()
        assert kl(tiny, steering, patch, TRAINING[:1]) < kl(tiny, steering, WeightPatch(), TRAINING[:1])


def test_a_projection_that_is_named_again_is_solved_again() -> None:
    tiny, steering = loaded("gpt2"), canonical_program("gpt2", intervention())
    twice = solve(tiny, steering, [Stage(1, "mlp", 1), Stage(1, "attn", 1), Stage(1, "mlp", 3)])
    assert sorted(edit.rank for edit in twice.low_rank.values()) == [1, 3]
    once = solve(tiny, steering, [Stage(1, "mlp", 2)])
    again = solve(tiny, steering, [Stage(1, "mlp", 7), Stage(1, "mlp", 2)])
    for name, edit in once.low_rank.items():
        assert torch.equal(again.low_rank[name].B @ again.low_rank[name].A, edit.B @ edit.A)


# ------------------------------------------------------------------------------------------- stages


def planned(*interventions: Intervention, options: CompileOptions | None = None) -> list[tuple[int, str, int]]:
    steering = canonical_program("llama", *interventions)
    return [(s.layer, s.projection, s.rank) for s in stages_of(loaded("llama"), steering, options)]


def test_the_default_stages_follow_the_program() -> None:
    following = [(2, "attn", 8), (2, "mlp", 8), (3, "attn", 8), (3, "mlp", 8)]
    assert planned(intervention("add", "resid_post", 1)) == [(1, "both", 1), (1, "mlp", 8), *following]
    assert planned(intervention("add", "resid_pre", 2)) == [(1, "both", 1), (1, "mlp", 8), *following]
    assert planned(intervention("add", "attn_out", 1)) == [(1, "attn", 1), (1, "mlp", 8), *following]
    assert planned(intervention("add", "mlp_out", 1, positions="response")) == [
        (1, "both", 8),
        (1, "mlp", 8),
        *following,
    ]
    assert planned(intervention("ablate", "mlp_out", 1)) == [(1, "both", 8), (1, "mlp", 8), *following]


def test_the_projections_of_a_block_are_solved_one_by_one_where_a_norm_or_experts_follow() -> None:
    one_by_one = [(1, "mlp", 1), (1, "attn", 1), (1, "mlp", 8)]
    for family, expected in (("gemma2", one_by_one), ("qwen3_moe", [(1, "attn", 1)])):
        stages = stages_of(loaded(family), canonical_program(family, intervention("add", "resid_post", 1)))
        assert [(s.layer, s.projection, s.rank) for s in stages if s.layer == 1] == expected


def test_no_default_stage_lies_above_the_last_block() -> None:
    assert planned(intervention(layer=3)) == [(3, "both", 1), (3, "mlp", 8)]
    both = planned(intervention(layer=1), intervention("ablate", layer=2))
    assert both == [(1, "both", 1), (1, "mlp", 8), (2, "both", 8), (2, "mlp", 8), (3, "attn", 8), (3, "mlp", 8)]


def pinned(*stages: ClosedFormStage) -> CompileOptions:
    return CompileOptions(closed_form=ClosedFormOptions(stages=stages))


def test_the_recipe_s_stages_count_from_the_first_changed_block() -> None:
    stages = (ClosedFormStage(offset=0, projection="mlp", rank=2), ClosedFormStage(offset=2, projection="attn", rank=5))
    assert planned(intervention("add", "resid_pre", 2), options=pinned(*stages)) == [(1, "mlp", 2), (3, "attn", 5)]


def test_a_stage_of_the_recipe_above_the_last_block_is_refused() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention(layer=3))
    options = pinned(ClosedFormStage(offset=1, projection="mlp", rank=2))
    with pytest.raises(CompileSteerError, match="blocks 0 to 3"):
        solve(tiny, steering, stages_of(tiny, steering, options))


def test_an_empty_program_is_refused_before_any_work() -> None:
    empty = canonical_program("llama", intervention(coefficient=0.0))
    assert not empty.interventions
    for name in ("closed_form", "distill"):
        assert "nothing to compile" in (BACKENDS[name].refusal(empty, loaded("llama").layout) or "")
        assert BACKENDS[name].refusal(canonical_program("llama", intervention()), loaded("llama").layout) is None


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_the_regression_counts_errors_as_the_stream_feels_them(family: str) -> None:
    """Weighted squared error of the regression = that in the stream, norm and multiplier passed."""
    layout = loaded(family).layout
    gain, multiplier = norm_weights(layout, layout.output_projection(1, "mlp")), layout.stream_scale(1, "mlp_out")
    written, missing, edit = (torch.randn(6, HIDDEN) * torch.linspace(0.2, 5, 6).unsqueeze(1) for _ in range(3))
    counts = torch.linspace(0.1, 2, 6)
    y, weight = regression_targets(missing, written, counts, multiplier, gain)
    # Behind a norm the solution is in units of its output; divided by the norm's weights it is the projection's.
    scale = multiplier if gain is None else 1 / written.square().mean(dim=1, keepdim=True).sqrt()
    moved = scale * edit
    error = weight * (y - edit).square().sum(dim=1) * (1.0 if gain is not None else multiplier**2)
    assert torch.allclose(error, counts * (missing - moved).square().sum(dim=1), rtol=1e-4)


@pytest.mark.parametrize("family", ["granite", "llama"])
def test_a_stage_minimises_the_error_in_the_stream_behind_a_multiplier(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of the solution is numpy's least squares, written down in the stream from the model's own activations."""
    monkeypatch.setattr("compile_steer.lowering.regression.RIDGES", (1e-7,))
    tiny, steering = loaded(family), canonical_program(family, intervention(layer=1))
    layout = tiny.layout
    projection = layout.output_projection(1, "mlp")
    (edit,) = solve(tiny, steering, [Stage(1, "mlp", HIDDEN)]).low_rank.values()

    batch = Padded.of(CALIBRATION, "right")
    real = batch.attention_mask.bool()
    caught: dict[str, torch.Tensor] = {}
    block, multiplier = layout.blocks[1], layout.stream_scale(1, "mlp_out")
    hooks = [
        projection.module.register_forward_hook(lambda _m, args, _out: caught.update(x=args[0][real])),
        block.register_forward_hook(
            lambda _m, _args, out: caught.update(h=(out if torch.is_tensor(out) else out[0])[real])
        ),
    ]
    logits(tiny.model, batch)
    for hook in hooks:
        hook.remove()
    x, h = caught["x"].double(), caught["h"].double()
    (added,) = steering.interventions
    missing = added.coefficient * added.vector.double()
    weight = 1 / h.norm(dim=1)
    rows = multiplier * x * weight.unsqueeze(1)
    for j in range(HIDDEN):
        row = torch.linalg.lstsq(rows, (weight * missing[j]).unsqueeze(1), driver="gelsd").solution[:, 0]
        assert torch.allclose((edit.B @ edit.A)[j].double(), row, rtol=0.02, atol=0.02 * float(row.abs().max()))


def test_a_mixture_of_experts_is_solved_through_its_attention_alone() -> None:
    tiny, steering = loaded("qwen3_moe"), canonical_program("qwen3_moe", intervention())
    stages = stages_of(tiny, steering)
    assert {stage.projection for stage in stages} == {"attn"}
    assert remaining_kl(tiny, steering, solve(tiny, steering, stages)) < 0.8
    with pytest.raises(CompileSteerError, match="stage mlp of block 1: the MLP of qwen3_moe is a mixture of experts"):
        solve(tiny, steering, [Stage(1, "mlp", 2)])


def test_every_problem_of_the_stages_is_reported_at_once() -> None:
    tiny, steering = loaded("qwen3_moe"), canonical_program("qwen3_moe", intervention())
    with pytest.raises(CompileSteerError) as caught:
        solve(tiny, steering, [Stage(9, "mlp", 2), Stage(1, "mlp", 2), Stage(1, "attn", 99)])
    assert caught.value.problems == (
        "compile.closed_form.stages:",
        "stage mlp of block 9: the model has blocks 0 to 3.",
        "stage mlp of block 1: the MLP of qwen3_moe is a mixture of experts: no one matrix writes what it adds to the stream.",
        "stage attn of block 1: rank 99 is above what its matrix (32 x 48) can have.",
    )
