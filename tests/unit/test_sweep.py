"""The sweep: its grid, the solver, and the search over layers."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch

import compile_steer.validation.stage
import compile_steer.validation.sweep
from compile_steer.common.errors import RecipeError
from compile_steer.common.figures import decisive
from compile_steer.common.progress import Progress
from compile_steer.common.terminal import Terminal
from compile_steer.report.terminal import print_validation
from compile_steer.scoring.answers import Answers
from compile_steer.steering.directions import EVERY_BLOCK
from compile_steer.steering.program import Program
from compile_steer.validation.choice import choose
from compile_steer.validation.coefficients import climb, solve
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.report import GridPoint, block_name
from compile_steer.validation.sweep import candidates, measure_grid, search_layers
from tests.helpers.tiny import HIDDEN, LAYERS
from tests.helpers.validation import (
    behaviour,
    chat_model,
    context,
    options,
    program_at,
    recipe,
    toward_w40,
    usual_validation,
    validated,
)
from tests.helpers.verification import RecordedNotes


def sweep_evaluator() -> ContrastEvaluator:
    return ContrastEvaluator(chat_model(), behaviour().validation[:6], behaviour().neutral[:4])


class Rising(ContrastEvaluator):
    """A random model may find neutral text more likely when it is steered; this one's perplexity has a known wall."""

    def perplexity_ratio(self, program: Program) -> float:
        (intervention,) = program.interventions
        return math.exp(0.11 * intervention.coefficient**2 / (1 + intervention.site.layer))


def rising() -> ContrastEvaluator:
    return Rising(chat_model(), behaviour().validation[:6], behaviour().neutral[:4])


def repeating(monkeypatch: pytest.MonkeyPatch, steered: float, base: float) -> None:
    """Answers of the sweep and of the base that repeat themselves so much."""
    for module, amount in ((compile_steer.validation.sweep, steered), (compile_steer.validation.stage, base)):

        def answered(*args: Any, real: Any = module.answer, amount: float = amount) -> list[Answers]:
            return [replace(one, repetition=np.full(len(one.texts), amount)) for one in real(*args)]

        monkeypatch.setattr(module, "answer", answered)


def test_what_repeats_less_than_the_base_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    repeating(monkeypatch, steered=0.31, base=0.40)
    report = validated(toward_w40(), max_repetition=0.2).report
    assert {point.repetition for point in report.grid} == {0.31}
    assert not any("repeats itself" in reason for reason in report.reasons)


def test_a_sweep_that_fails_shows_its_points_and_the_digits_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    repeating(monkeypatch, steered=0.204, base=0.1)
    notes = RecordedNotes()
    with pytest.raises(RecipeError, match=r"and repeats 0\.204; allowed are 20 and 0\.2\. Try smaller"):
        validated(toward_w40(), progress=notes, max_repetition=0.2)
    points = [line for line in notes.texts if line.startswith("layer ")]
    assert len(points) == 4 and all("repetition 0.204" in point and "perplexity x" in point for point in points)


@pytest.mark.parametrize(
    ("value", "limit", "form", "shown"),
    [
        (0.204, 0.2, ".2f", ("0.204", "0.2")),
        (0.2, 0.2, ".2f", ("0.20", "0.2")),
        (0.9, 0.2, ".2f", ("0.90", "0.2")),
        (1.30004, 1.3, ".2f", ("1.30004", "1.3")),
        (0.949_96, 0.95, ".2%", ("94.996%", "95.000%")),
        (1.0001e-6, 1e-6, ".2e", ("1.0001e-06", "1.0000e-06")),
        (math.nan, 0.5, ".2f", ("nan", "0.5")),
    ],
)
def test_the_digits_that_decide_are_shown(value: float, limit: float, form: str, shown: tuple[str, str]) -> None:
    assert decisive(value, limit, form) == shown


def test_a_layer_stops_beyond_the_perplexity_limit_with_a_reason() -> None:
    coefficients = (0.4, 3.0, 9.0, -0.4)
    chosen = options(coefficients=coefficients, max_perplexity_ratio=1.4)
    grid, effects = measure_grid(rising(), chosen, [1], program_at, Progress())
    assert [point.coefficient for point in grid] == list(coefficients)
    kept, stop, beyond, negative = grid
    assert not kept.skipped and not negative.skipped and set(effects) == {(1, 0.4), (1, -0.4)}
    assert stop.skipped.startswith("perplexity of control text x") and stop.perplexity_ratio == pytest.approx(
        math.exp(0.495)
    )
    assert beyond.skipped == "coefficient 3 of this layer is beyond the perplexity limit already"
    assert beyond.perplexity_ratio is None and beyond.margin is None
    everything, _effects = measure_grid(rising(), chosen, [1], program_at, Progress(), stop_factor=math.inf)
    assert not any(point.skipped for point in everything)
    assert everything[0] == kept and everything[1].perplexity_ratio == pytest.approx(stop.perplexity_ratio, rel=1e-6)


def test_the_solver_finds_the_largest_coefficient_within_the_perplexity_limit() -> None:
    chosen = options(coefficients={"perplexity_limit": 1.3})
    grid, _effects = measure_grid(rising(), chosen, [1, 2], program_at, Progress())
    for point in grid:
        exact = math.sqrt(math.log(1.3) * (1 + point.layer) / 0.11)
        assert point.evaluations is not None and point.evaluations <= 6
        assert 0.98 * exact <= point.coefficient <= exact * (1 + 1e-9)


def test_the_solver_finds_the_coefficient_of_a_divergence() -> None:
    chosen = options(coefficients={"kl": 0.2})
    grid, _effects = measure_grid(sweep_evaluator(), chosen, [1, 2], program_at, Progress())
    for point in grid:
        assert point.evaluations is not None and point.evaluations <= 8
        assert sweep_evaluator().divergence(program_at(point.layer, point.coefficient)) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("power", [1.3, 2.0, 2.9])
@pytest.mark.parametrize("root", [0.031, 0.4, 1.0, 7.3, 40.0])
def test_the_solver_is_within_its_tolerance_for_curves_that_are_no_parabolas(power: float, root: float) -> None:
    def curve(c: float) -> float:
        return math.pow(c / root, power) * 0.3 + 0.02 * math.pow(c / root, 4) - 0.02

    solutions = [solve(curve, 0.3, below=below) for below in (True, False)]
    for coefficient, evaluated in solutions:
        assert coefficient == pytest.approx(root, rel=0.02) and len(evaluated) <= 8
    assert (solutions[0][0] or math.inf) <= root * (1 + 1e-9)


def test_a_target_out_of_reach_skips_the_layer_with_a_reason() -> None:
    chosen = options(coefficients={"kl": 500.0})
    (point,), effects = measure_grid(sweep_evaluator(), chosen, [1], program_at, Progress())
    assert "reaches KL(steered||base) = 500" in point.skipped and not effects


@pytest.mark.parametrize(
    ("near", "evaluated"), [(1.0, [1.0, 1.5, 2.0]), (1.6, [1.5, 2.0]), (9.0, [3.0, 2.0, 1.5]), (0.1, 4)]
)
def test_climb_starts_near_the_last_coefficient(near: float, evaluated: list[float] | int) -> None:
    seen: list[float] = []

    def holds(value: float) -> bool:
        seen.append(value)
        return value < 1.8

    assert climb(holds, [0.5, 1.0, 1.5, 2.0, 3.0], near) == 1.5
    assert seen == evaluated or len(seen) == evaluated
    assert climb(lambda _value: False, [0.5, 1.0], near) is None
    assert climb(lambda _value: True, [0.5, 1.0], near) == 1.0


def test_halving_keeps_the_layers_that_a_whole_grid_would(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = toward_w40().vectors.clone()
    vectors[[0, 1]] = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    directions = toward_w40(vectors=vectors)
    chosen = options(layers="search", coefficients=[0.4, 0.8], sweep_layers=1)

    def pick(layer: int, c: float) -> Program:
        return directions.program(layer, c, "all")

    monkeypatch.setattr(compile_steer.validation.sweep, "_LAST_LAYERS", 1)
    left, rungs = search_layers(context(), chosen, range(LAYERS), pick)
    assert [rung.pairs for rung in rungs] == [4, 6] and [len(rung.margins) for rung in rungs] == [4, 2]
    grid, _effects = measure_grid(sweep_evaluator(), chosen, range(LAYERS), pick, Progress())
    best = max((point for point in grid if point.margin is not None), key=lambda point: point.margin or 0.0)
    assert left == [best.layer]


def test_a_joint_program_is_one_candidate_at_every_block() -> None:
    small = toward_w40().vectors / 3
    result = validated(toward_w40(vectors=small, joint=True), layers="auto", coefficients=[0.4])
    report, program = result.report, result.program
    assert report.layer == EVERY_BLOCK and report.where == block_name(EVERY_BLOCK) == "every block"
    assert [i.site.layer for i in program.interventions] == list(range(LAYERS))
    with pytest.raises(RecipeError, match="act at every block at once"):
        candidates(recipe().validate_, toward_w40(joint=True))


def point(coefficient: float, score: float, ratio: float, margin: float, p_value: float = 0.01) -> GridPoint:
    return GridPoint(2, coefficient, margin, ratio, p_value=p_value, score=score, repetition=0.0)


def test_of_points_with_the_same_score_the_cheapest_is_chosen_if_it_reaches_the_effect() -> None:
    weak, cheap, strong = point(1.0, 0.25, 1.02, 0.2), point(1.5, 0.75, 1.1, 0.5), point(2.5, 0.75, 1.4, 0.9)
    assert choose([weak, cheap, strong], options(), base_score=0.0, repetition=0.0, n_prompts=8) is cheap
    assert (
        choose([weak, replace(cheap, p_value=0.3), strong], options(), base_score=0.0, repetition=0.0, n_prompts=8)
        is strong
    )
    # Where nothing scores more than the base, there is no effect yet that a cheaper point could reach.
    assert choose([weak, cheap, strong], options(), base_score=0.75, repetition=0.0, n_prompts=8) is strong
    assert (
        choose([weak, replace(strong, repetition=0.99), cheap], options(), base_score=0.0, repetition=0.0, n_prompts=8)
        is cheap
    )


def test_the_frontier_holds_the_points_that_no_cheaper_one_reaches() -> None:
    skipped = GridPoint(3, 4.0, perplexity_ratio=9.0, skipped="beyond")
    grid = [
        point(2.5, 0.75, 1.4, 0.9),
        point(1.0, 0.25, 1.02, 0.2),
        point(1.5, 0.75, 1.1, 0.5),
        point(1.2, 0.2, 1.05, 0.3),
    ]
    report = replace(usual_validation().report, grid=[*grid, skipped], layer=2, coefficient=1.5)
    assert report.frontier == [grid[1], grid[2]]
    stream = StringIO()
    print_validation(Terminal(file=stream, width=200), report)
    scores = [line.split("│")[5].strip() for line in stream.getvalue().splitlines() if line.startswith("│")]
    assert scores == ["0.75", "0.25 *", "0.75 *", "0.20", ""]
