"""Both output projections of a block solved together, and the matrices that its MLP reads by."""

from __future__ import annotations

import pytest
import torch

from compile_steer.common.errors import CannotLower
from compile_steer.lowering import joint, regression
from compile_steer.lowering.block_pass import HELD_OUT_EVERY, held_out_error, products, recorded
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.low_rank import transpose_conv1d
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from compile_steer.steering.sites import OperationName
from tests.helpers.fitting import CALIBRATION, canonical_program, random_texts, remaining_kl, solve, stages_of
from tests.helpers.tiny import intervention, loaded

LAYER = 1
READERS = {
    "llama": ["mlp.gate_proj", "mlp.up_proj"],
    "gpt2": ["mlp.c_fc"],
    "phi3": ["mlp.gate_up_proj"],
    "granite": ["mlp.gate_proj", "mlp.up_proj"],
    "gpt_neox": [],  # reads the same stream as the attention, which is found by what the attention's edit does to it
}


def models_at(family: str, steering: Program) -> TeacherStudent:
    models = TeacherStudent(steering, loaded(family), CALIBRATION, 4096, lambda _texts: None, dial=True)
    models.run_teacher(LAYER)
    return models


def solved(family: str, steering: Program, rank: int = 1) -> TeacherStudent:
    models = models_at(family, steering)
    joint.solve_jointly(models, LAYER, rank, lambda _texts: None, print)
    return models


@pytest.mark.parametrize("family", READERS)
def test_the_matrices_that_read_what_the_attention_wrote_are_edited_with_both_projections(family: str) -> None:
    models = solved(family, canonical_program(family, intervention("add", "resid_post", LAYER)))
    layout = models.loaded.layout
    prefix = layout.output_projection(LAYER, "mlp").name.split(".mlp")[0]
    projections = [layout.output_projection(LAYER, kind).name for kind in ("attn", "mlp")]
    readers = [f"{prefix}.{name}" for name in READERS[family]]
    if family == "gpt2":  # its MLP's projection alone leaves a ten-thousandth, and is kept
        assert set(models.solved) == set(projections)
    else:
        assert set(models.solved) == {*projections, *readers}


@pytest.mark.parametrize("family", ["llama", "granite", "phi3"])
def test_the_mlp_reads_what_it_did_before_the_attention_wrote_the_change(family: str) -> None:
    models = solved(family, canonical_program(family, intervention("add", "resid_post", LAYER)))
    layout, activations = models.loaded.layout, models.batches[0]
    attn, mlp = (layout.output_projection(LAYER, kind) for kind in ("attn", "mlp"))
    readers = set(models.solved) - {attn.name, mlp.name}
    without = WeightPatch({name: edit for name, edit in models.solved.items() if name not in readers})
    inputs = []
    for patch in (WeightPatch(), models.patch, without):
        with with_patch(models.loaded.model, patch), recorded(layout.model, [mlp.name]) as calls:
            models.run_block(activations.batch, activations.student, LAYER)
        inputs.append(calls[mlp.name][0].view(*activations.real.shape, -1)[activations.real])
    before, edited, unedited = inputs
    assert float((edited - before).norm()) < 0.5 * float((unedited - before).norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "phi3", "gpt_neox"])
@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_it_is_no_worse_than_one_projection_after_the_other(family: str, operation: OperationName) -> None:
    steering = canonical_program(family, intervention(operation, "resid_post", LAYER))
    tiny, rank = loaded(family), 1 if operation == "add" else 8
    plans = [Stage(LAYER, "both", rank)], [Stage(LAYER, "mlp", rank), Stage(LAYER, "attn", rank)]
    together, one_by_one = (remaining_kl(tiny, steering, solve(tiny, steering, plan)) for plan in plans)
    assert together < 1.1 * one_by_one


def test_the_way_is_chosen_by_texts_that_nothing_was_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "RIDGES", (0.1,))  # which the held-out texts choose
    steering = canonical_program("llama", intervention("add", "resid_post", LAYER))
    other = random_texts(len(CALIBRATION), 9)
    mixed = [other[n] if n % HELD_OUT_EVERY == 0 else text for n, text in enumerate(CALIBRATION)]
    judged: list[list[WeightPatch]] = []
    for texts in (CALIBRATION, mixed):
        found: list[WeightPatch] = []

        def judge(models: TeacherStudent, block: int, patch: WeightPatch, found: list[WeightPatch] = found) -> float:
            found.append(patch)
            return held_out_error(models, block, patch)

        monkeypatch.setattr(joint, "held_out_error", judge)
        models = TeacherStudent(steering, loaded("llama"), texts, 4096, lambda _texts: None, dial=True)
        models.run_teacher(LAYER)
        joint.solve_jointly(models, LAYER, 1, lambda _texts: None, print)
        judged.append([*found, models.patch])
    for one, same in zip(judged[0][:2], judged[1][:2], strict=True):
        for name, edit in one.low_rank.items():
            torch.testing.assert_close(edit.B @ edit.A, same.low_rank[name].B @ same.low_rank[name].A)
    last, changed = (patches[-1].low_rank for patches in judged)
    assert any(not torch.allclose(last[n].B @ last[n].A, changed[n].B @ changed[n].A, rtol=1e-3) for n in last)


@pytest.mark.parametrize("family", ["llama", "granite", "phi3"])
def test_less_is_left_than_by_one_projection_after_the_other(family: str) -> None:
    steering = canonical_program(family, intervention("add", "resid_post", LAYER))
    stages = stages_of(loaded(family), steering)
    assert [stage.projection for stage in stages[:2]] == ["both", "mlp"]
    before = [Stage(LAYER, "mlp", 1), Stage(LAYER, "attn", 1), *stages[1:]]
    new, old = (solve(loaded(family), steering, plan, dial=True) for plan in (stages, before))
    assert remaining_kl(loaded(family), steering, new) < 0.9 * remaining_kl(loaded(family), steering, old)
    # The artifact's scale is a dial, as it was.
    assert remaining_kl(loaded(family), -steering, -1.0 * new) < remaining_kl(loaded(family), -steering, -1.0 * old)


def test_earlier_edits_of_the_block_are_replaced_and_others_stay() -> None:
    steering = canonical_program("llama", intervention("add", "resid_post", LAYER))
    once, twice = solved("llama", steering), models_at("llama", steering)
    other = f"{twice.loaded.layout.measured.blocks}.{LAYER + 1}.mlp.down_proj"
    for _time in range(2):
        joint.solve_jointly(twice, LAYER, 1, lambda _texts: None, print)
        twice.solved[other] = next(iter(twice.solved.values()))
    for name, edit in once.solved.items():
        assert torch.equal(twice.solved[name].B, edit.B)
        assert torch.equal(twice.solved[name].A, edit.A)
    assert other in twice.solved


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])  # a Conv1D in the second, biases in the third
def test_the_product_of_a_matrix_is_that_of_its_weight(family: str) -> None:
    models = models_at(family, canonical_program(family, intervention("add", "resid_post", LAYER)))
    layout = models.loaded.layout
    name = f"{layout.measured.blocks}.{LAYER}.mlp." + {"llama": "up_proj", "gpt2": "c_fc", "phi": "fc1"}[family]
    module = layout.model.get_submodule(name)
    B = torch.randn(layout.d_model, 3, generator=torch.Generator().manual_seed(0))
    found = products(models, LAYER, [name], B)[name]
    torch.testing.assert_close(found, transpose_conv1d(module, module.weight.detach()) @ B, rtol=1e-4, atol=1e-5)


def test_a_block_with_norms_behind_its_projections_has_no_such_stage() -> None:
    steering = canonical_program("gemma2", intervention("add", "resid_post", LAYER))
    with pytest.raises(CannotLower, match="stage both of block 1: .*without a norm behind it"):
        solve(loaded("gemma2"), steering, [Stage(LAYER, "both", 1)])


def test_a_mixture_of_experts_has_no_such_stage() -> None:
    steering = canonical_program("qwen3_moe", intervention("add", "resid_post", LAYER))
    assert "both" not in {stage.projection for stage in stages_of(loaded("qwen3_moe"), steering)}
    with pytest.raises(CannotLower, match="stage both of block 1: .*mixture of experts"):
        solve(loaded("qwen3_moe"), steering, [Stage(LAYER, "both", 1)])
