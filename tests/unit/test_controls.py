"""Control directions: of the same strength as the program, at the same sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from compile_steer.common.progress import Progress
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.sites import Point
from compile_steer.validation.controls import StreamStatistics, measure_controls
from compile_steer.validation.evaluator import ContrastEvaluator
from tests.helpers.tiny import HIDDEN, LAYERS
from tests.helpers.validation import behaviour, chat_model, program_at, toward_w40, validated


def test_controls_have_the_strength_of_the_program_at_every_site() -> None:
    base = StreamStatistics.of(chat_model(), behaviour().neutral, "resid_post", program_at(1, 0.7))
    lengths = torch.tensor([1.5, 2.5, 3.5, 4.5]).unsqueeze(1)
    joint = toward_w40(joint=True, vectors=toward_w40().vectors / 7 * lengths).program(EVERY_BLOCK, 0.7, "all")
    first, second = base.random(joint, 2, seed=4)
    for program in (first, second):
        assert [float(i.vector.norm()) for i in program.interventions] == pytest.approx([1.5, 2.5, 3.5, 4.5])
        units = torch.stack([i.vector / i.vector.norm() for i in program.interventions])
        assert float((units @ units.T - torch.eye(LAYERS)).abs().max()) < 0.9  # each site has its own
    assert not torch.equal(first.interventions[0].vector, second.interventions[0].vector)
    clamp = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5)).program(2, 0.7, "response")
    stream = StreamStatistics.of(chat_model(), behaviour().neutral, "resid_post", clamp)
    for program in stream.random(clamp, 3, seed=5):
        (i,) = program.interventions
        assert float(i.vector.norm()) == pytest.approx(1.0)
        assert stream.displacement(i) == pytest.approx(stream.displacement(clamp.interventions[0]), rel=1e-4)
    assert stream.strength(clamp) == pytest.approx(
        0.7 * abs(stream.displacement(clamp.interventions[0])) / float(stream.norms[2])
    )


def test_a_random_direction_is_no_outlier_among_random_ones() -> None:
    stream = StreamStatistics.of(chat_model(), behaviour().neutral, "resid_post", program_at(2, 0.8))
    evaluator = ContrastEvaluator(chat_model(), behaviour().test)
    good = measure_controls(
        evaluator, program_at(2, 0.8), stream.random(program_at(2, 0.8), 20, 1), [], "", None, Progress()
    )
    assert good.p_value == pytest.approx(1 / 21) and good.p_random < 0.01
    (fake,) = stream.random(program_at(2, 0.8), 1, seed=77)
    bad = measure_controls(evaluator, fake, stream.random(fake, 20, 1), [], "", None, Progress())
    assert bad.p_random > 0.01


def beside_w40() -> Directions:
    """Every block at once, with vectors at a second point."""
    directions = toward_w40(joint=True)
    noise = torch.randn(7, LAYERS, HIDDEN, generator=torch.Generator().manual_seed(9))
    lengths = torch.tensor([0.5, 1.5, 2.5, 3.5])[:LAYERS, None]
    beside: dict[Point, torch.Tensor] = {"mlp_out": noise / noise.norm(dim=-1, keepdim=True) * 2.0}
    return replace(
        directions,
        vectors=directions.vectors / 7 * lengths,
        shuffled=directions.shuffled / 7 * lengths,
        other_points=beside,
    )


@pytest.mark.parametrize("kind", ["add", "ablate", "beside"])
def test_a_control_from_shuffled_labels_has_all_sites_of_the_program(kind: str) -> None:
    """With the length that its extraction gave it."""
    directions = beside_w40() if kind == "beside" else toward_w40(operation=kind)
    directions = replace(directions, shuffled=0.3 * directions.shuffled)
    options: dict[str, Any] = {"coefficients": [1.0]} | ({"layers": "auto"} if kind == "beside" else {})
    result = validated(directions, **options)
    report, program = result.report, result.program
    evaluator = ContrastEvaluator(chat_model(), behaviour().test[:6])
    others = [directions.control(n).program(report.layer, 1.0, "all") for n in range(6)]
    assert [[i.site for i in program.interventions] for program in others] == [
        [i.site for i in program.interventions]
    ] * 6
    assert report.controls.shuffled == pytest.approx(evaluator.effects(others).mean(axis=1).tolist(), abs=1e-5)
    assert report.controls.effect == pytest.approx(evaluator.effects([program]).mean(), abs=1e-5)


def test_controls_of_an_ablation_ablate_one_direction_at_every_site() -> None:
    program = toward_w40(operation="ablate").program(2, 1.0, "all")
    unit = toward_w40().vectors[2] / 7.0
    assert len(program.interventions) == 1 + 2 * LAYERS
    assert all(torch.allclose(i.vector, unit, atol=1e-6) and i.operation == "ablate" for i in program.interventions)
    stream = StreamStatistics.of(chat_model(), behaviour().neutral, "resid_post", program)
    first, second = stream.random(program, 2, seed=4)
    for control in (first, second):
        assert len({tuple(i.vector.tolist()) for i in control.interventions}) == 1
        assert [(i.site, i.operation) for i in control.interventions] == [
            (i.site, i.operation) for i in program.interventions
        ]
    assert not torch.equal(first.interventions[0].vector, second.interventions[0].vector)
