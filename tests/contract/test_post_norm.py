"""The closed form where a norm stands behind every output projection, on weights like those of trained models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from compile_steer.common.progress import Progress
from compile_steer.lowering import distill, projection, teacher_student
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.job import Curve, Lowering
from compile_steer.lowering.options import ClosedFormOptions, ClosedFormStage, CompileOptions, DistillOptions
from compile_steer.lowering.post_norm import Behind, behind_norm
from compile_steer.lowering.teacher_student import TeacherStudent, measure_sensitivity
from compile_steer.steering.low_rank import LowRank
from tests.helpers.fitting import CALIBRATION, canonical_program, remaining_kl, solve, stages_of
from tests.helpers.lifelike import lifelike
from tests.helpers.tiny import HIDDEN, LAYERS, intervention, loaded


def undamped(start: LowRank, gain: Tensor, _tokens: object, _penalty: float) -> LowRank:
    """What was done first: the regression's solution divided by the norm's weights."""
    return LowRank(start.B / gain.unsqueeze(1), start.A)


@pytest.mark.parametrize(("family", "limit"), [("gemma3_text", 0.6), ("olmo2", 0.6)])
def test_norm_weights_of_trained_models_do_not_spoil_the_edit_behind_them(
    family: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lifelike(family)
    steering = canonical_program(family, replace(intervention(), coefficient=10.0))
    stages = stages_of(model, steering)
    left = remaining_kl(model, steering, solve(model, steering, stages))
    monkeypatch.setattr(projection, "behind_norm", undamped)
    before = remaining_kl(model, steering, solve(model, steering, stages[:1]))  # nothing of it is kept
    assert left < limit < 0.9 < before


def test_an_edit_that_drowns_its_projection_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, steering = lifelike("olmo2"), canonical_program("olmo2", intervention())
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda _self, text: said.append(text))
    solve(model, steering, [Stage(1, "mlp", 1)])
    assert not said
    monkeypatch.setattr(projection, "behind_norm", undamped)
    (edit,) = solve(model, steering, [Stage(1, "mlp", 1)]).low_rank.values()
    assert not edit.B.any()
    assert "layers.1.mlp.down_proj: the edit found writes" in said[0] and "times what the projection does" in said[0]


def loss(tokens: Behind, gain: Tensor, edit: LowRank, penalty: float) -> float:
    def norm(z: Tensor) -> Tensor:
        return rms_norm(z.double(), (HIDDEN,), gain.double(), 1e-6)

    moved = norm(tokens.written + tokens.read @ edit.B.T) - norm(tokens.written)
    error = tokens.weight * (tokens.missing - moved).square().sum(dim=1)
    return float(error.sum() + penalty * (gain.unsqueeze(1) * edit.B @ edit.A).double().square().sum())


def test_what_is_written_behind_a_norm_is_the_best_there_is() -> None:
    """No small change of B leaves less, though the regression's own answer leaves several times as much."""
    torch.manual_seed(0)
    gain = 10 * torch.exp(torch.randn(HIDDEN))
    gain[3], gain[11] = 0.01, -0.1
    A = torch.randn(2, 20)
    missing = (gain * torch.randn(HIDDEN) / 2).expand(200, -1)
    tokens = Behind(torch.randn(200, 2) + 2, torch.randn(200, HIDDEN), missing, torch.rand(200))
    start = LowRank(gain.unsqueeze(1) * torch.randn(HIDDEN, 2) / 10, A)
    edit = behind_norm(start, gain, [tokens], 1e-3)
    least = loss(tokens, gain, edit, 1e-3)
    assert least < 0.5 * loss(tokens, gain, LowRank(start.B / gain.unsqueeze(1), A), 1e-3)
    for _ in range(20):
        step = 0.03 * torch.randn(HIDDEN, 2) * edit.B.norm() / HIDDEN
        assert loss(tokens, gain, LowRank(edit.B + step, A), 1e-3) > 0.9999 * least


def test_a_dimension_counts_by_what_the_blocks_above_make_of_it() -> None:
    """The next block reads dimension 4 a hundred times as strongly as the others, and dimension 5 not at all."""
    model = lifelike("gemma3_text")
    with torch.no_grad():
        for name, weight in model.model.named_parameters():
            if name.split(".")[2] in ("2", "3") and name.split(".")[3] in (
                "input_layernorm",
                "pre_feedforward_layernorm",
            ):
                weight[:] = 0.0
                weight[4], weight[5] = 99.0, -1.0
    steering = canonical_program("gemma3_text", intervention(layer=1))
    found = measure_sensitivity(steering, model, CALIBRATION, [1, LAYERS - 1], 0)
    assert int(found[1].argmax()) == 4
    assert float(found[1][5]) < float(found[1].median())
    assert float(found[1].square().mean()) == pytest.approx(1.0, rel=1e-3)
    final: Tensor = model.model.get_parameter("model.norm.weight") + 1
    assert torch.corrcoef(torch.stack([found[LAYERS - 1].log(), final.abs().log()]))[0, 1] > 0.9


def test_without_a_norm_behind_it_nothing_is_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_student, "_SENSITIVITY_TOKENS", None)  # cannot be measured
    solve(loaded("llama"), canonical_program("llama", intervention()), [Stage(1, "mlp", 1)])


def test_a_block_is_trained_on_what_the_blocks_above_make_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steering = lifelike("olmo2"), canonical_program("olmo2", replace(intervention(), coefficient=10.0))
    stages = (ClosedFormStage(offset=0, projection="mlp", rank=1),)
    options = CompileOptions(
        closed_form=ClosedFormOptions(stages=stages), distill=DistillOptions(block_steps=60, rank=4)
    )
    lowering = Lowering(steering, model, [], options)
    lowering.__dict__["regression_texts"] = list(CALIBRATION)
    own, left = distill.fit_block, []

    def unweighted(models: TeacherStudent, *rest: Any) -> Curve:
        with monkeypatch.context() as patch:
            patch.setattr(models, "sensitivity", {})
            return own(models, *rest)

    for fit in (own, unweighted):
        monkeypatch.setattr(distill, "fit_block", fit)
        left.append(remaining_kl(model, steering, distill.fit_blocks(lowering)))
    assert left[0] < 0.8 * left[1] < 0.5, left
