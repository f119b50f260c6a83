"""The exact backends on every family: merged, saved and reloaded by stock transformers, they equal the hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compile_steer.common.errors import ArtifactError
from compile_steer.export.merged import merged_model
from compile_steer.lowering import exact
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.steering.hooks import steered
from compile_steer.steering.layout import Layout
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program, ablate_everywhere
from compile_steer.steering.sites import POINTS, Point
from tests.helpers.captures import captured
from tests.helpers.rounding import assert_close_to_rounding, assert_same_weights
from tests.helpers.tiny import (
    ALL_SITES,
    FAMILIES,
    LAYER,
    LAYERS,
    Padded,
    build,
    intervention,
    loaded,
    logits,
    program,
    relative_error,
    texts,
    vector,
)

Save = Callable[[str], LoadedModel]
# Every output projection of these families is a matrix whose output is added to the stream as it is.
PLAIN = [
    f for f in FAMILIES if "mlp" in (kinds := loaded(f).layout).projection_kinds(1) and kinds.norm(1, "mlp") is None
]


# --------------------------------------------------------------------------------- the bias backend


def job(tiny: LoadedModel, steering: Program) -> Lowering:
    return Lowering(canonical(steering), tiny, ())


def reloaded(tiny: LoadedModel, patch: WeightPatch, folder: Path) -> PreTrainedModel:
    """The merged checkpoint as a user's plain transformers would load it."""
    merged = merged_model(tiny.source, patch)
    with quiet():
        merged.save_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    reloaded_model: PreTrainedModel = model.eval()
    return reloaded_model


def must_equal_hooks(tiny: LoadedModel, steering: Program, folder: Path, name: str = "bias") -> WeightPatch:
    """Lower, merge, save and reload; compare with the hooks on both padding sides and through the cache."""
    backend = BACKENDS[name]
    assert backend.refusal(canonical(steering), tiny.layout) is None
    patch = backend.lower(job(tiny, steering))
    compiled = reloaded(tiny, patch, folder)
    for side in ("left", "right"):
        inputs = Padded.of(texts(), side)
        with steered(tiny.model, steering):
            expected = logits(tiny.model, inputs)
        assert relative_error(logits(compiled, inputs), expected) < 1e-5
        assert relative_error(logits(tiny.model, inputs), expected) > 1e-3
    prompts = Padded.of(texts(((5, 0), (2, 0), (4, 0))), "left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    with steered(tiny.model, steering):
        wanted_tokens = tiny.model.generate(**ids, **settings)
    assert torch.equal(compiled.generate(**ids, **settings), wanted_tokens)
    return patch


def legal_points(family: str) -> list[Point]:
    layout = loaded(family).layout
    return [
        p
        for p in POINTS
        if exact.bias_refusal(canonical(program(family, intervention("add", p, LAYER))), layout) is None
    ]


@pytest.mark.parametrize(("family", "point"), ALL_SITES)
def test_where_a_bias_is_legal_the_reloaded_checkpoint_equals_the_hooks(
    family: str, point: Point, saved: Save, tmp_path: Path
) -> None:
    steering = program(family, intervention("add", point, LAYER))
    if point not in legal_points(family):
        assert exact.bias_refusal(canonical(steering), saved(family).layout)
        return
    patch = must_equal_hooks(saved(family), steering, tmp_path / "merged")
    assert len(patch.bias) == 1
    assert not patch.low_rank


@pytest.mark.parametrize("family", [family for family in FAMILIES if legal_points(family)])
def test_several_shifts_share_biases_and_equal_the_hooks(family: str, saved: Save, tmp_path: Path) -> None:
    points = legal_points(family)
    several = [intervention("add", p, 1 + n % 2, coefficient=1.1 + n, seed=n) for n, p in enumerate(points)]
    several += [intervention("add", points[-1], LAYERS - 1, coefficient=-0.7, seed=9)]
    several += [intervention("add", points[0], 1, coefficient=-0.9, seed=8)]  # onto the first one's own bias
    patch = must_equal_hooks(saved(family), program(family, *several), tmp_path / "merged")
    assert 1 < len(patch.bias) < len(several) or len(points) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_checkpoint_that_has_biases_already_keeps_them(family: str, tmp_path: Path) -> None:
    flags = {"attention_bias": True} | ({"mlp_bias": True} if family == "llama" else {})
    model = build(family, **flags)
    model.save_pretrained(tmp_path / "base")
    tiny = replace(loaded(family), model=model, source=str(tmp_path / "base"))
    steering = program(family, *(intervention("add", point, 1) for point in legal_points(family)))
    patch = must_equal_hooks(tiny, steering, tmp_path / "merged")
    assert patch.config_flags == ()


def test_a_neox_whose_sublayers_run_in_sequence_is_the_same_to_the_bias(tmp_path: Path) -> None:
    model = build("gpt_neox", use_parallel_residual=False)
    model.save_pretrained(tmp_path / "base")
    tiny = replace(loaded("gpt_neox"), model=model, source=str(tmp_path / "base"))
    steering = program("gpt_neox", *(intervention("add", point, 1, seed=n) for n, point in enumerate(POINTS)))
    must_equal_hooks(tiny, steering, tmp_path / "merged")


def test_a_config_flag_names_only_the_biases_that_are_needed(saved: Save) -> None:
    cases: list[tuple[tuple[Point, ...], tuple[str, ...]]] = [
        (("mlp_out",), ("mlp_bias",)),
        (("attn_out", "resid_post"), ("attention_bias", "mlp_bias")),
    ]
    for points, flags in cases:
        steering = program("llama", *(intervention("add", point, 1) for point in points))
        assert exact.bias_patch(canonical(steering), saved("llama").layout).config_flags == flags
    assert exact.bias_patch(program("gpt2", intervention()), saved("gpt2").layout).config_flags == ()


def test_a_checkpoint_without_biases_gets_the_flag_that_adds_them() -> None:
    layout = Layout.of(build("gpt_neox", attention_bias=False))
    steering = canonical(program("gpt_neox", intervention("add", "attn_out", 1)))
    assert exact.bias_refusal(steering, layout) is None
    assert exact.bias_patch(steering, loaded("gpt_neox").layout).config_flags == ()
    assert exact.bias_patch(steering, layout).config_flags == ("attention_bias",)


def test_one_illegal_intervention_refuses_the_whole_program_and_names_itself() -> None:
    steering = program("llama", intervention(layer=1), intervention("ablate", "mlp_out", 3))
    refusal = exact.bias_refusal(canonical(steering), loaded("llama").layout)
    assert refusal == "ablate at mlp_out 3: a bias cannot ablate; it only shifts"


def test_nothing_lies_below_the_first_block() -> None:
    steering = canonical(program("gpt2", intervention("add", "resid_pre", 0)))
    assert (
        exact.bias_refusal(steering, loaded("gpt2").layout)
        == "add at resid_pre 0: no output projection lies below block 0"
    )


# ------------------------------------------------------------------- the other two exact backends


@pytest.mark.parametrize("family", PLAIN)
def test_ablating_output_projections_in_the_weights_equals_the_hooks(family: str, saved: Save, tmp_path: Path) -> None:
    """Several ablations on one projection, in order; with the adds and clamps that the family's biases allow."""
    several = [
        intervention("add", "resid_post", 2, seed=6),  # after the ablations of its MLP, though it stands before them
        intervention("ablate", "attn_out", 1, seed=1),
        intervention("ablate", "mlp_out", 2, seed=2),
        intervention("ablate", "mlp_out", 2, coefficient=0.9, seed=3),
    ]
    layout = loaded(family).layout
    if exact.orthogonalise_refusal(canonical(program(family, *several)), layout) is not None:
        del several[0]
    for more in (intervention("clamp", "mlp_out", 2, seed=4), intervention("add", "attn_out", 1, seed=5)):
        if exact.orthogonalise_refusal(canonical(program(family, *several, more)), layout) is None:
            several.append(more)
    patch = must_equal_hooks(saved(family), program(family, *several), tmp_path / "merged", "orthogonalise")
    assert {edit.rank for edit in patch.low_rank.values()} >= {1}
    assert max(edit.rank for edit in patch.low_rank.values()) >= 2


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("coefficient", [1.0, 0.6])
def test_ablating_everywhere_is_exact_and_the_stream_never_holds_the_direction(
    family: str, coefficient: float, saved: Save, tmp_path: Path
) -> None:
    tiny = saved(family)
    steering = program(family, *ablate_everywhere(vector(3, 1.0), LAYERS, coefficient))
    patch = must_equal_hooks(tiny, steering, tmp_path / "merged", "orthogonalise")
    assert patch.untie == tiny.layout.tied
    assert len(steering.describe().splitlines()) == 1
    compiled = reloaded(tiny, patch, tmp_path / "again")
    inputs = Padded.of(texts(), "right")
    with captured(family, compiled) as streams:
        logits(compiled, inputs)
    real = inputs.attention_mask.bool()
    for state in (*streams.before.values(), *streams.after.values()):
        held = (state[real] @ vector(3, 1.0)).abs().max() / state[real].norm(dim=-1).max()
        assert (float(held) < 1e-5) == (coefficient == 1.0)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_rewritten_checkpoint_is_the_same_function_and_then_holds_the_shifts(
    family: str, saved: Save, tmp_path: Path
) -> None:
    tiny = saved(family)
    inputs = Padded.of(texts(), "left")
    empty = reloaded(tiny, WeightPatch(architecture="llama", config_flags=("mlp_bias",)), tmp_path / "plain")
    assert type(empty).__name__ == "LlamaForCausalLM"
    assert_same_weights(empty, tiny.model)
    assert_close_to_rounding(logits(empty, inputs), logits(tiny.model, inputs))
    several = [intervention("add", p, 1 + n % 2, seed=n) for n, p in enumerate(POINTS)]
    patch = must_equal_hooks(tiny, program(family, *several), tmp_path / "merged", "retarget")
    assert patch.config_flags == ("attention_bias", "mlp_bias")


def test_a_window_that_acts_is_not_rewritten_away() -> None:
    steering = canonical(program("mistral", intervention()))
    for window, refused in ((6, True), (64, False), (None, False)):
        layout = Layout.of(build("mistral", sliding_window=window))
        assert (exact.convert_refusal(steering, layout) is not None) == refused
    assert "not one of the families" in (exact.convert_refusal(steering, loaded("gpt2").layout) or "")
    assert exact.convert_refusal(steering, loaded("llama").layout) == "it is llama already"


# ------------------------------------------------------------------------------------------- merging


def test_a_patch_for_other_modules_or_widths_is_refused(saved: Save) -> None:
    source = saved("gpt2").source
    for patch, message in (
        (
            WeightPatch(bias={"transformer.h.9.mlp.c_proj": vector(0)}),
            r"h\.9\.mlp\.c_proj, which the base does not have",
        ),
        (WeightPatch(bias={"transformer.h.1.mlp.c_proj": vector(0, width=31)}), "no bias of width 31"),
        (
            WeightPatch(bias={"transformer.h.1.mlp.c_proj": vector(0) / 0}),
            "NaN or infinity in transformer.h.1.mlp.c_proj",
        ),
    ):
        with pytest.raises(ArtifactError, match=message):
            merged_model(source, patch)
    with pytest.raises(ArtifactError, match=r"no bias of width 32 on model\.layers\.1\.mlp\.down_proj"):
        merged_model(saved("mistral").source, WeightPatch(bias={"model.layers.1.mlp.down_proj": vector(0)}))
