"""Training on tiny models: what it adds to the regression, what it must leave alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from compile_steer.common.errors import CannotLower, RecipeError
from compile_steer.lowering import closed_form, distill, joint
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.optimizer import relative_adamw, trainable
from compile_steer.lowering.options import ClosedFormOptions, ClosedFormStage, CompileOptions, DistillOptions
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.measure import ProjectionKind
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from tests.helpers.captures import n_hooks
from tests.helpers.fitting import (
    CALIBRATION,
    FAMILIES,
    HELD_OUT,
    TRAINING,
    canonical_program,
    job,
    remaining_kl,
    solve,
    stages_of,
)
from tests.helpers.tiny import Padded, intervention, loaded, logits

OPTIONS = DistillOptions(start="random", rank=3, epochs=3, learning_rate=0.1, batch_tokens=128, block_steps=200)

KINDS: tuple[ProjectionKind, ...] = ("attn", "mlp")
ONE_STAGE = ClosedFormOptions(stages=(ClosedFormStage(offset=0, projection="mlp", rank=4),))


def train(tiny: LoadedModel, steering: Program, start: WeightPatch, options: DistillOptions = OPTIONS) -> WeightPatch:
    return distill.train_end_to_end(
        job(tiny, steering, CompileOptions(distill=options)), TRAINING, start, lambda _done: None
    )


@pytest.mark.parametrize(("family", "limit"), [("llama", 0.25), ("gpt2", 0.25), ("gemma2", 0.4), ("granite", 0.2)])
def test_training_from_a_random_patch_lowers_the_divergence_on_texts_it_never_saw(family: str, limit: float) -> None:
    tiny = loaded(family)
    steering = canonical_program(family, intervention(positions="all"))
    start = distill.random_patch(tiny.layout, 1, OPTIONS.rank, seed=0)
    assert remaining_kl(tiny, steering, start) == pytest.approx(1.0), "a random start is the base"
    patch = train(tiny, steering, start)
    assert {name: edit.rank for name, edit in patch.low_rank.items()} == dict.fromkeys(start.low_rank, OPTIONS.rank)
    assert remaining_kl(tiny, steering, patch) < limit


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_training_goes_on_from_the_closed_form(family: str) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention())
    start = solve(tiny, steering, [Stage(1, "mlp", 1), *(Stage(k, kind, 8) for k in (2, 3) for kind in KINDS)])
    patch = train(tiny, steering, start, OPTIONS.model_copy(update={"learning_rate": 0.02}))
    assert remaining_kl(tiny, steering, patch) < 0.92 * remaining_kl(tiny, steering, start)


@pytest.mark.parametrize(
    ("family", "steps", "factor"),
    [("llama", 400, 0.4), ("gpt2", 900, 0.6), ("gemma2", 400, 0.5), ("granite", 400, 0.2)],
)
def test_training_a_block_on_its_own_output_beats_the_regression_there(family: str, steps: int, factor: float) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention())
    # Many steps: a third of them are at the opposite strength.
    changes = {"start": "closed_form", "block_steps": steps}
    options = CompileOptions(closed_form=ONE_STAGE, distill=OPTIONS.model_copy(update=changes))
    task = job(tiny, steering, options)
    task.__dict__["regression_texts"] = CALIBRATION
    before, hooks = remaining_kl(tiny, steering, closed_form.lower(task)), n_hooks(tiny.model)
    fitted = distill.fit_blocks(task)
    assert len(task.curves["block 1"]["loss"]) == steps
    assert remaining_kl(tiny, steering, fitted) < factor * before
    assert all(".1." in name for name in fitted.low_rank), "only the intervened block"
    assert n_hooks(tiny.model) == hooks


def test_a_block_is_trained_to_follow_its_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    options = CompileOptions(
        closed_form=ONE_STAGE, distill=OPTIONS.model_copy(update={"start": "closed_form", "block_steps": 100})
    )
    left = []
    for strengths in (distill._STRENGTHS, (1.0,)):
        monkeypatch.setattr(distill, "_STRENGTHS", strengths)
        task = job(tiny, steering, options)
        task.__dict__["regression_texts"] = CALIBRATION
        left.append(remaining_kl(tiny, steering.scaled(-1), -1 * distill.fit_blocks(task)))
    assert left[0] < 0.5 * left[1], left


def test_a_step_is_relative_to_each_row_and_each_column_of_an_edit() -> None:
    rows, columns = torch.tensor([1.0, 1e-2, 5.0]), torch.tensor([10.0, 1.0, 1e-2, 2.0])
    edits = {"fitted": LowRank(torch.ones(3, 2) * rows[:, None], torch.ones(2, 4) * columns)}
    edits["fresh"] = LowRank(torch.zeros(3, 2), 3 * torch.ones(2, 4))
    trained = trainable(edits, torch.device("cpu"))
    optimizer = relative_adamw(trained, 0.25)
    for factor in (factor for edit in trained.values() for factor in (edit.B, edit.A)):
        factor.grad = torch.full_like(factor, -7.0)
    optimizer.step()
    moved = {name: (trained[name].B - edit.B, trained[name].A - edit.A) for name, edit in edits.items()}
    by_row, by_column = moved["fitted"]
    assert by_row.flatten().tolist() == pytest.approx([0.25, 0.25, 0.025, 0.025, 1.25, 1.25]), "1e-2 counts as a tenth"
    assert by_column[0].tolist() == pytest.approx([2.5, 0.25, 0.025, 0.5])
    assert moved["fresh"][0].flatten().tolist() == pytest.approx([0.75] * 6), (
        "of the partner, where there is nothing yet"
    )


def test_training_a_block_that_does_not_help_leaves_the_regression() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    options = CompileOptions(
        closed_form=ONE_STAGE, distill=OPTIONS.model_copy(update={"block_learning_rate": 1e4, "block_steps": 20})
    )
    task = job(tiny, steering, options)
    task.__dict__["regression_texts"] = CALIBRATION
    fitted, solved = distill.fit_blocks(task), closed_form.lower(task)
    assert fitted.low_rank.keys() == solved.low_rank.keys()


def test_where_next_to_nothing_is_left_there_is_nothing_to_train_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_ENOUGH", 0.02)  # a model of 32 dimensions leaves more
    for positions, left in (("all", False), ("response", True)):
        tiny, steering = loaded("qwen3"), canonical_program("qwen3", intervention(positions=positions))
        options = OPTIONS.model_copy(update={"start": "closed_form", "block_steps": 2})
        task = job(tiny, steering, CompileOptions(distill=options))
        task.__dict__["regression_texts"] = CALIBRATION
        # The task has no prompts, so texts to train on cannot be written.
        with pytest.raises(RecipeError, match="distill.prompts") if left else nullcontext():
            patch = distill.lower(task)
            assert patch.low_rank.keys() == closed_form.lower(task).low_rank.keys() and not task.curves


@pytest.mark.parametrize("kept", [False, True])
def test_where_the_closed_form_is_exact_it_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    monkeypatch.setattr(joint, "_ENOUGH", 0.02)  # a model of 32 dimensions leaves more
    monkeypatch.setattr(distill, "fit_blocks", lambda _lowering: pytest.fail("the blocks were solved again"))
    tiny, steering = loaded("qwen3"), canonical_program("qwen3", intervention())
    task = job(tiny, steering, CompileOptions(distill=OPTIONS.model_copy(update={"start": "closed_form"})))
    task.__dict__["regression_texts"] = CALIBRATION
    task.patches["closed_form"] = solved = closed_form.lower(task)
    if kept:  # by an earlier run
        task.exact.clear()
    assert distill.lower(task) is solved


def test_training_that_makes_things_worse_gives_the_start_back() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    start = solve(tiny, steering, stages_of(tiny, steering))
    assert train(tiny, steering, start, OPTIONS.model_copy(update={"learning_rate": 50.0})) is start


def test_training_is_the_same_for_the_same_seed_and_leaves_model_and_start_alone() -> None:
    tiny, steering = loaded("granite"), canonical_program("granite", intervention("ablate", "attn_out", 1))
    start = distill.random_patch(tiny.layout, 1, 2, seed=4)
    copy = {name: (edit.B.clone(), edit.A.clone()) for name, edit in start.low_rank.items()}
    batch = Padded.of(HELD_OUT, "right")
    before, base = n_hooks(tiny.model), logits(tiny.model, batch)
    short = OPTIONS.model_copy(update={"epochs": 0.5})
    first, second = (train(tiny, steering, start, short) for _ in range(2))
    assert all(torch.equal(first.low_rank[name].B, second.low_rank[name].B) for name in copy)
    assert any(bool(first.low_rank[name].B.any()) for name in copy)
    assert all(
        torch.equal(start.low_rank[n].B, B) and torch.equal(start.low_rank[n].A, A) for n, (B, A) in copy.items()
    )
    assert n_hooks(tiny.model) == before
    assert torch.equal(logits(tiny.model, batch), base)
    assert not any(parameter.grad is not None for parameter in tiny.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_patch_holds_every_linear_from_the_first_block_on_and_is_nothing_yet(family: str) -> None:
    tiny = loaded(family)
    patch = distill.random_patch(tiny.layout, 2, 3, seed=0)
    per_block = 4 if family == "gpt2" else 7
    assert len(patch.low_rank) == 2 * per_block
    assert all(".2." in name or ".3." in name for name in patch.low_rank)
    batch = Padded.of(HELD_OUT, "right")
    base = logits(tiny.model, batch)
    with with_patch(tiny.model, patch):
        assert torch.equal(logits(tiny.model, batch), base)
    assert all(bool(edit.A.any()) and not bool(edit.B.any()) for edit in patch.low_rank.values())
    other = distill.random_patch(tiny.layout, 2, 3, seed=1)
    name = sorted(patch.low_rank)[0]
    assert not torch.equal(patch.low_rank[name].A, other.low_rank[name].A)


def test_a_rank_that_no_matrix_can_have_is_refused_before_any_text_is_written() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    wide = CompileOptions(distill=OPTIONS.model_copy(update={"rank": 25}))
    with pytest.raises(CannotLower, match=r"rank 25 is above what model\.layers\.1\.self_attn\.k_proj \(24 x 32\)"):
        distill.lower(job(tiny, steering, wide))
    with pytest.raises(CannotLower, match="stage mlp of block 1: rank 33 is above"):
        solve(tiny, steering, [closed_form.Stage(1, "mlp", 33)])
