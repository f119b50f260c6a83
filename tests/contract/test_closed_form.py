"""The approximate backends on tiny models: how much of KL(steered || base) they take away on held-out texts.

Random models are harder than trained ones: the inputs of a gated MLP's writer have hardly any mean there.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from compile_steer.behaviour import Behaviour, Encoded
from compile_steer.errors import CompileSteerError
from compile_steer.hooks import steered
from compile_steer.lower import Job, closed_form, distill
from compile_steer.lower.closed_form import Stage, plan_stages, solve_stages
from compile_steer.models import Loaded
from compile_steer.passes import canonical
from compile_steer.patch import LowRank, WeightPatch, applied
from compile_steer.program import Intervention, Program
from compile_steer.progress import Meter
from compile_steer.recipe import ClosedForm, ClosedFormStage, Compile, Distill
from tests.tiny import HIDDEN, LAYERS, Padded, intervention, loaded, logits, n_hooks, program, texts

FAMILIES = ("llama", "gpt2", "gemma2", "granite")


def several(count: int, seed: int) -> list[Encoded]:
    return texts([(4 + n % 5, 12 + n % 7) for n in range(count)], seed=seed)


CALIBRATION, HELD_OUT, TRAINING = several(60, 1), several(20, 2), several(40, 3)


def steering_of(family: str, *interventions: Intervention) -> Program:
    return canonical(program(family, *interventions))


def job(one: Loaded, steering: Program, options: Compile | None = None) -> Job:
    nothing = Behaviour((), (), (), (), (), (), {})
    return Job(steering, one, nothing, options or Compile(), 0, Meter())


def solve(one: Loaded, steering: Program, stages: Sequence[Stage]) -> WeightPatch:
    return solve_stages(steering, one, CALIBRATION, stages, lambda _done: None)


def kl(one: Loaded, steering: Program, patch: WeightPatch, rows: Sequence[Encoded] = HELD_OUT) -> float:
    """Mean KL(steered || patched) in nats a token, from whole passes with explicit roles."""
    batch = Padded.of(rows, "right")
    with steered(one.model, steering, roles=batch.roles):
        wanted = logits(one.model, batch).double().log_softmax(dim=-1)
    with applied(one.model, patch):
        found = logits(one.model, batch).double().log_softmax(dim=-1)
    return float(functional.kl_div(found, wanted, log_target=True, reduction="batchmean"))


def share(one: Loaded, steering: Program, patch: WeightPatch) -> float:
    return kl(one, steering, patch) / kl(one, steering, WeightPatch())


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
    one = loaded(family)
    for wanted, intervened in (
        (attn_out, intervention("add", "attn_out", 1)),
        (resid_post, intervention("add", "resid_post", 1)),
        (resid_pre, intervention("add", "resid_pre", 0)),
        (clamp, intervention("clamp", "mlp_out", 1)),
    ):
        steering = steering_of(family, intervened)
        assert share(one, steering, solve(one, steering, plan_stages(job(one, steering)))) < wanted


@pytest.mark.parametrize(
    ("family", "wanted"),
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
def test_the_last_block_s_output_is_matched_before_the_final_norm(family: str, wanted: float) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention("add", "resid_post", LAYERS - 1))
    stages = [Stage(LAYERS - 1, "attn", 8), Stage(LAYERS - 1, "mlp", 8)]
    assert share(one, steering, solve(one, steering, stages)) < wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_program_for_the_response_alone_is_imitated_in_part(family: str) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention(positions="response"))
    assert share(one, steering, solve(one, steering, plan_stages(job(one, steering)))) < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_each_stage_corrects_what_the_ones_before_it_left(family: str) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention("add", "attn_out", 1))
    stages = plan_stages(job(one, steering))[:4]
    found = [share(one, steering, solve(one, steering, stages[:n])) for n in range(1, len(stages) + 1)]
    assert len(found) == 4
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_is_the_program_s_and_not_another_s(family: str) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention())
    patch = solve(one, steering, plan_stages(job(one, steering)))
    right = share(one, steering, patch)
    assert share(one, -steering, patch) > 1.0, "the opposite program"
    assert share(one, steering_of(family, intervention(seed=5)), patch) > 3 * right, "another vector"
    flipped = {name: type(edit)(-edit.B, edit.A) for name, edit in patch.low_rank.items()}
    assert share(one, steering, WeightPatch(flipped)) > 1.0, "the sign flipped"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_shift_of_a_block_gives_a_patch_of_rank_one_whatever_is_asked(family: str) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention())
    patch = solve(one, steering, [Stage(1, "mlp", 8)])
    ((name, edit),) = patch.low_rank.items()
    assert name == one.layout.writer(1, "mlp").name
    assert (tuple(edit.B.shape), tuple(edit.A.shape)) == ((32, 8), (8, 48))
    assert (edit.B.dtype, edit.A.dtype) == (torch.float32, torch.float32)
    sizes = torch.linalg.svdvals(edit.B @ edit.A)
    # Behind a norm each token needs the shift times its own scale, in the metric of the norm's weights.
    assert float(sizes[1] / sizes[0]) < (1e-2 if one.layout.post_norm else 1e-3)


def test_solving_leaves_the_model_as_it_was() -> None:
    one = loaded("gpt2")
    batch = Padded.of(HELD_OUT, "right")
    before, base = n_hooks(one.model), logits(one.model, batch)
    solve(one, steering_of("gpt2", intervention()), [Stage(1, "attn", 2), Stage(2, "mlp", 2)])
    assert n_hooks(one.model) == before
    assert torch.equal(logits(one.model, batch), base)


def test_one_text_is_enough_or_refused_in_words() -> None:
    one = loaded("llama")
    steering = steering_of("llama", intervention())
    try:
        patch = solve_stages(steering, one, TRAINING[:1], [Stage(1, "mlp", 2)], lambda _done: None)
    except CompileSteerError as error:
        assert "calibration" in str(error)
    else:
        patch.require_finite()
        assert kl(one, steering, patch, TRAINING[:1]) < kl(one, steering, WeightPatch(), TRAINING[:1])


def test_a_writer_that_is_solved_twice_is_refused_or_keeps_both_solutions() -> None:
    one = loaded("gpt2")
    steering = steering_of("gpt2", intervention())
    once = share(one, steering, solve(one, steering, [Stage(1, "mlp", 2)]))
    try:
        twice = share(one, steering, solve(one, steering, [Stage(1, "mlp", 2), Stage(1, "mlp", 2)]))
    except CompileSteerError as error:
        assert "twice" in str(error)
    else:
        assert twice < 1.1 * once


# ------------------------------------------------------------------------------------------- stages


def planned(*interventions: Intervention, options: Compile | None = None) -> list[tuple[int, str, int]]:
    steering = steering_of("llama", *interventions)
    return [(s.layer, s.writer, s.rank) for s in plan_stages(job(loaded("llama"), steering, options))]


def test_the_default_stages_follow_the_program() -> None:
    following = [(2, "attn", 8), (2, "mlp", 8), (3, "attn", 8), (3, "mlp", 8)]
    assert planned(intervention("add", "resid_post", 1)) == [(1, "mlp", 1), *following]
    assert planned(intervention("add", "resid_pre", 2)) == [(1, "mlp", 1), *following]
    assert planned(intervention("add", "attn_out", 1)) == [(1, "attn", 1), (1, "mlp", 8), *following]
    assert planned(intervention("add", "mlp_out", 1, positions="response")) == [(1, "mlp", 8), *following]
    assert planned(intervention("ablate", "mlp_out", 1)) == [(1, "mlp", 8), *following]


def test_no_default_stage_lies_above_the_last_block_and_none_stands_twice() -> None:
    assert planned(intervention(layer=3)) == [(3, "mlp", 1)]
    both = planned(intervention(layer=1), intervention("ablate", layer=2))
    assert both == [(1, "mlp", 1), (2, "attn", 8), (2, "mlp", 8), (3, "attn", 8), (3, "mlp", 8)]


def stages_of(*stages: ClosedFormStage) -> Compile:
    return Compile(closed_form=ClosedForm(stages=stages))


def test_the_recipe_s_stages_count_from_the_first_changed_block() -> None:
    wanted = (ClosedFormStage(offset=0, writer="mlp", rank=2), ClosedFormStage(offset=2, writer="attn", rank=5))
    assert planned(intervention("add", "resid_pre", 2), options=stages_of(*wanted)) == [(1, "mlp", 2), (3, "attn", 5)]


def test_a_stage_of_the_recipe_above_the_last_block_is_refused() -> None:
    one, steering = loaded("llama"), steering_of("llama", intervention(layer=3))
    options = stages_of(ClosedFormStage(offset=1, writer="mlp", rank=2))
    with pytest.raises(CompileSteerError, match="blocks 0 to 3"):
        solve(one, steering, plan_stages(job(one, steering, options)))


def test_an_empty_program_is_refused_before_any_work() -> None:
    empty = steering_of("llama", intervention(coefficient=0.0))
    assert not empty.interventions
    for backend in (closed_form, distill):
        assert "nothing to compile" in (backend.refusal(empty, loaded("llama").layout) or "")
        assert backend.refusal(steering_of("llama", intervention()), loaded("llama").layout) is None


# ------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "granite"])
def test_the_regression_counts_errors_as_the_stream_feels_them(family: str) -> None:
    """Weighted squared error of the regression = that in the stream over ||h||^2, norm and multiplier passed."""
    layout = loaded(family).layout
    channel = closed_form._Channel(layout, layout.writer(1, "mlp"))
    written, stream, wanted, edit = (torch.randn(6, HIDDEN) * torch.linspace(0.2, 5, 6).unsqueeze(1) for _ in range(4))
    y, weight = channel.pull_back(wanted, written, stream)
    # The edit is diag(edit) in the regression's own coordinates; push_forward gives what the writer really adds.
    real = torch.stack(
        [channel.push_forward(LowRank(row.double().unsqueeze(1), torch.ones(1, 1))).B[:, 0] for row in edit]
    )
    if layout.post_norm:
        gain = layout.blocks[1].get_submodule("post_feedforward_layernorm")(torch.ones(HIDDEN))
        moved = gain * real / written.square().mean(dim=1, keepdim=True).sqrt()
    else:
        moved = layout.residual_multiplier * real
    found = weight * (y - edit).square().sum(dim=1) * (1.0 if layout.post_norm else layout.residual_multiplier**2)
    assert torch.allclose(found.double(), (wanted - moved).square().sum(dim=1) / stream.square().sum(dim=1), rtol=1e-4)


OPTIONS = Distill(start="random", rank=3, epochs=3, learning_rate=0.1, batch_tokens=128)


ONE_STAGE = ClosedForm(stages=(ClosedFormStage(offset=0, writer="mlp", rank=4),))


def train(one: Loaded, steering: Program, start: WeightPatch, options: Distill = OPTIONS) -> WeightPatch:
    return distill.train(steering, one, TRAINING, start, options, 0, lambda _done: None)


@pytest.mark.parametrize(("family", "wanted"), [("llama", 0.25), ("gpt2", 0.25), ("gemma2", 0.4), ("granite", 0.2)])
def test_training_from_a_random_patch_lowers_the_divergence_on_texts_it_never_saw(family: str, wanted: float) -> None:
    one = loaded(family)
    steering = steering_of(family, intervention(positions="all"))
    start = distill.random_patch(one.layout, 1, OPTIONS.rank, seed=0)
    assert share(one, steering, start) == pytest.approx(1.0), "a random start is the base"
    found = train(one, steering, start)
    assert {name: edit.rank for name, edit in found.low_rank.items()} == dict.fromkeys(start.low_rank, OPTIONS.rank)
    assert share(one, steering, found) < wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_training_goes_on_from_the_closed_form(family: str) -> None:
    one, steering = loaded(family), steering_of(family, intervention())
    start = solve(one, steering, plan_stages(job(one, steering)))
    found = train(one, steering, start, OPTIONS.model_copy(update={"learning_rate": 0.02}))
    assert share(one, steering, found) < 0.92 * share(one, steering, start)


@pytest.mark.parametrize(("family", "factor"), [("llama", 0.6), ("gpt2", 0.6), ("gemma2", 0.8), ("granite", 0.6)])
def test_training_a_block_on_its_own_output_beats_the_regression_there(family: str, factor: float) -> None:
    one, steering = loaded(family), steering_of(family, intervention())
    options = Compile(closed_form=ONE_STAGE, distill=OPTIONS.model_copy(update={"start": "closed_form"}))
    task = job(one, steering, options)
    task.__dict__["regression_texts"] = CALIBRATION
    before = share(one, steering, closed_form.lower(task))
    fitted = distill.fitted_patch(task)
    assert share(one, steering, fitted) < factor * before
    assert all(".1." in name for name in fitted.low_rank), "only the intervened block"
    assert n_hooks(one.model) == 0


def test_training_a_block_that_does_not_help_leaves_the_regression() -> None:
    one, steering = loaded("llama"), steering_of("llama", intervention())
    options = Compile(closed_form=ONE_STAGE, distill=OPTIONS.model_copy(update={"block_learning_rate": 1e4}))
    task = job(one, steering, options)
    task.__dict__["regression_texts"] = CALIBRATION
    fitted, solved = distill.fitted_patch(task), closed_form.lower(task)
    assert fitted.low_rank.keys() == solved.low_rank.keys()


def test_training_that_makes_things_worse_gives_the_start_back() -> None:
    one, steering = loaded("llama"), steering_of("llama", intervention())
    start = solve(one, steering, plan_stages(job(one, steering)))
    assert train(one, steering, start, OPTIONS.model_copy(update={"learning_rate": 50.0})) is start


def test_training_is_the_same_for_the_same_seed_and_leaves_model_and_start_alone() -> None:
    one, steering = loaded("granite"), steering_of("granite", intervention("ablate", "attn_out", 1))
    start = distill.random_patch(one.layout, 1, 2, seed=4)
    copy = {name: (edit.B.clone(), edit.A.clone()) for name, edit in start.low_rank.items()}
    batch = Padded.of(HELD_OUT, "right")
    before, base = n_hooks(one.model), logits(one.model, batch)
    short = OPTIONS.model_copy(update={"epochs": 0.5})
    first, second = (train(one, steering, start, short) for _ in range(2))
    assert all(torch.equal(first.low_rank[name].B, second.low_rank[name].B) for name in copy)
    assert any(bool(first.low_rank[name].B.any()) for name in copy)
    assert all(
        torch.equal(start.low_rank[n].B, B) and torch.equal(start.low_rank[n].A, A) for n, (B, A) in copy.items()
    )
    assert n_hooks(one.model) == before
    assert torch.equal(logits(one.model, batch), base)
    assert not any(parameter.grad is not None for parameter in one.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_patch_holds_every_linear_from_the_first_block_on_and_is_nothing_yet(family: str) -> None:
    one = loaded(family)
    patch = distill.random_patch(one.layout, 2, 3, seed=0)
    per_block = 4 if family == "gpt2" else 7
    assert len(patch.low_rank) == 2 * per_block
    assert all(".2." in name or ".3." in name for name in patch.low_rank)
    batch = Padded.of(HELD_OUT, "right")
    base = logits(one.model, batch)
    with applied(one.model, patch):
        assert torch.equal(logits(one.model, batch), base)
    assert all(bool(edit.A.any()) and not bool(edit.B.any()) for edit in patch.low_rank.values())
    other = distill.random_patch(one.layout, 2, 3, seed=1)
    name = sorted(patch.low_rank)[0]
    assert not torch.equal(patch.low_rank[name].A, other.low_rank[name].A)
