"""Training end to end on tiny models: every objective, its memory-saving forms, and resuming after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering, ResumeFiles, SavedState
from compile_steer.lowering.optimizer import relative_adamw, trainable
from compile_steer.lowering.options import CalibrationOptions, CompileOptions, DistillOptions
from compile_steer.lowering.teacher_student import SuffixModel
from compile_steer.lowering.training import OBJECTIVES, train
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import steered
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from tests.helpers.captures import n_hooks
from tests.helpers.fitting import CALIBRATION, HELD_OUT, TRAINING, canonical_program, job, remaining_kl
from tests.helpers.tiny import Padded, intervention, loaded, logits, random_patch

OPTIONS = DistillOptions(start="random", rank=3, epochs=4, learning_rate=0.1, batch_tokens=256)


def task(tiny: LoadedModel, steering: Program, **changes: Any) -> Lowering:
    options = CompileOptions(
        calibration=CalibrationOptions(prompts=1, max_new_tokens=8), distill=OPTIONS.model_copy(update=changes)
    )
    return job(tiny, steering, options)


def trained(lowering: Lowering, start: WeightPatch, texts: list[Encoded] = TRAINING) -> WeightPatch:
    return distill.train_end_to_end(lowering, texts, start, lambda _done: None)


def random_start(tiny: LoadedModel, first: int = 1) -> WeightPatch:
    return distill.random_patch(tiny.layout, first, OPTIONS.rank, seed=0)


def same(a: WeightPatch, b: WeightPatch, tolerance: float = 0.0) -> bool:
    return all(
        bool((a.low_rank[n].B - b.low_rank[n].B).abs().max() <= tolerance)
        and bool((a.low_rank[n].A - b.low_rank[n].A).abs().max() <= tolerance)
        for n in a.low_rank
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("objective", "limit"),
    [("forward_kl", 0.4), ("reverse_kl", 0.6), ("jensen_shannon", 0.5), ("hidden", 0.6), ("likelihood", 0.97)],
)
def test_every_objective_brings_the_student_nearer(family: str, objective: str, limit: float) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention(positions="all"))
    texts = TRAINING
    if objective == "likelihood":  # a sampled token says something only where it was sampled from the steered model
        prompts = [replace(text, ids=text.ids[: text.n_prompt]) for text in [*CALIBRATION, *TRAINING]]
        texts = task(tiny, steering).sample(prompts, steering, seed=1)
    before, hooks = logits(tiny.model, Padded.of(HELD_OUT, "right")), n_hooks(tiny.model)
    config, forward = tiny.model.config.to_dict(), tiny.model.__dict__.get("forward")
    lowering = task(tiny, steering, objective=objective)
    patch = trained(lowering, random_start(tiny), texts)
    assert remaining_kl(tiny, steering, patch) < limit
    assert n_hooks(tiny.model) == hooks
    assert (tiny.model.config.to_dict(), tiny.model.__dict__.get("forward")) == (config, forward)
    assert torch.equal(logits(tiny.model, Padded.of(HELD_OUT, "right")), before), "the base is as it was"
    curve = lowering.curves["distill"]
    assert curve["held_out_kl"][1] < curve["held_out_kl"][0]
    assert len(curve["loss"]) > 4


def test_the_losses_are_what_they_are_called() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    batch = Padded.of(HELD_OUT[:3], "right")
    with steered(tiny.model, steering, roles=batch.roles):
        log_p = logits(tiny.model, batch).double().log_softmax(dim=-1)
    log_q = logits(tiny.model, batch).double().log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    expected = {
        "forward_kl": (p * (log_p - log_q)).sum(-1).mean(),
        "reverse_kl": (q * (log_q - log_p)).sum(-1).mean(),
        "jensen_shannon": (0.5 * (p * (log_p - m.log()) + q * (log_q - m.log())).sum(-1)).mean(),
    }
    (item,) = SuffixModel(tiny, steering, first=1).batches(HELD_OUT[:3], 4096)
    for name, value in expected.items():
        student = SuffixModel(tiny, steering, first=1).student(item).requires_grad_()
        loss = OBJECTIVES[name](tiny.model, item, student, 1.0)
        assert loss == pytest.approx(float(value), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saving_memory_gives_the_same_gradient(family: str) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention(positions="response"))
    start = random_start(tiny, 0)
    plain, half, saving = (trained(task(tiny, steering, recompute_every=every), start) for every in (0, 2, 1))
    assert same(plain, half, 1e-5) and same(plain, saving, 1e-5)
    rough = trained(task(tiny, steering, precision="bfloat16"), start)
    assert not same(plain, rough, 1e-5)
    assert abs(remaining_kl(tiny, steering, rough) - remaining_kl(tiny, steering, plain)) < 0.1


def test_several_small_batches_to_a_step_are_fewer_steps() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    one_a_step, three_a_step = task(tiny, steering), task(tiny, steering, accumulate=3)
    trained(one_a_step, random_start(tiny))
    patch = trained(three_a_step, random_start(tiny))
    steps = len(one_a_step.curves["distill"]["loss"])
    assert len(three_a_step.curves["distill"]["loss"]) in {steps // 3, steps // 3 + 1, 4 * (-(-(steps // 4) // 3))}
    assert remaining_kl(tiny, steering, patch) < 1.0


class Stopped(Exception):
    """What a kill is to a test."""


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_a_stopped_training_resumes_and_ends_in_the_same_result(objective: str, tmp_path: Path) -> None:
    tiny, steering = loaded("granite"), canonical_program("granite", intervention("ablate", "attn_out", 1))
    settings = {"objective": objective, "save_every": 3, "epochs": 3}
    whole = task(tiny, steering, **settings)
    expected = trained(whole, random_start(tiny))

    seen = 0.0

    def stop(done: float) -> None:
        nonlocal seen
        seen += done
        if seen > 1.6 * len(TRAINING):
            raise Stopped

    kept = replace(task(tiny, steering, **settings), resume=ResumeFiles(tmp_path, "inputs"))
    with pytest.raises(Stopped):
        distill.train_end_to_end(kept, TRAINING, random_start(tiny), stop)
    again = replace(task(tiny, steering, **settings), resume=ResumeFiles(tmp_path, "inputs"))
    steps: list[float] = []
    resumed = distill.train_end_to_end(again, TRAINING, random_start(tiny), steps.append)
    assert same(resumed, expected), "bit by bit"
    assert again.curves == whole.curves
    assert len(steps) < len(whole.curves["distill"]["loss"]), "it did not begin again"


def state_of(lowering: Lowering, name: str) -> SavedState:
    """The state that lies there, whatever it was made from."""
    assert lowering.resume.folder is not None
    path = lowering.resume.folder / f"{name}.pt"
    return SavedState(path, torch.load(path, weights_only=True)["made_from"], lowering.progress.note)


def test_a_stopped_pass_over_the_blocks_resumes_after_the_last_solved_one(tmp_path: Path) -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention(layer=0))
    settings = {"start": "closed_form", "block_steps": 20}

    def run(files: ResumeFiles) -> tuple[Lowering, WeightPatch]:
        lowering = replace(task(tiny, steering, **settings), resume=files)
        lowering.__dict__["regression_texts"] = CALIBRATION
        return lowering, distill.fit_blocks(lowering)

    whole, expected = run(ResumeFiles())
    lowering, _patch = run(ResumeFiles(tmp_path, "x"))
    saved = state_of(lowering, "distill block by block")
    state = saved.load()
    assert state["next"] == tiny.layout.n_layers
    # As if it had been killed after the first two blocks.
    early = {n: (e.B, e.A) for n, e in expected.low_rank.items() if ".0." in n or ".1." in n}
    saved.save({**state, "next": 2, "solved": early})
    again, resumed = run(ResumeFiles(tmp_path, "x"))
    assert same(resumed, expected)
    assert again.curves == whole.curves


def test_the_weight_of_the_base_keeps_the_student_near_it() -> None:
    """A student that starts far from the base on its own texts comes nearer with the penalty than without."""
    tiny, steering = loaded("llama"), canonical_program("llama", intervention(positions="response", coefficient=0.4))
    prompts = [replace(text, ids=text.ids[: text.n_prompt]) for text in HELD_OUT]
    drift = []
    for weight in (0.0, 20.0):
        lowering = task(tiny, steering, base_kl_weight=weight, objective="hidden", epochs=2)
        patch = WeightPatch(trainable(random_patch(tiny, ranks=(3,)).low_rank, tiny.device))
        optimizer = relative_adamw(patch.low_rank, 0.03)
        train(lowering, CALIBRATION, patch, optimizer, lowering.options.distill, "distill", lambda _done: None)
        batch = Padded.of(lowering.sample(prompts, None, seed=3), "right")
        base = logits(tiny.model, batch).double().log_softmax(-1)
        with with_patch(tiny.model, patch), torch.no_grad():
            student = logits(tiny.model, batch).double().log_softmax(-1)
        drift.append(float((base.exp() * (base - student)).sum(-1).mean()))
    assert drift[1] < 0.8 * drift[0]


def test_a_patch_knows_the_first_block_it_edits() -> None:
    layout = loaded("gpt2").layout
    edit = LowRank(torch.zeros(32, 1), torch.zeros(1, 32))
    assert WeightPatch({"transformer.h.2.attn.c_proj": edit}).first_layer(layout) == 2
    assert WeightPatch().first_layer(layout) == layout.n_layers
    assert WeightPatch(bias={"transformer.h.1.mlp.c_proj": torch.zeros(32)}).first_layer(layout) == 1
