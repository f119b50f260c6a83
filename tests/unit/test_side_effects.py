"""What steering costs besides the behaviour: measured against the base, gated by tolerances, and named in the first line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compile_steer.models.load import LoadedModel
from compile_steer.scoring.answers import Answers
from compile_steer.scoring.language import languages
from compile_steer.scoring.questions import QUESTIONS
from compile_steer.stats import Interval
from compile_steer.validation.choice import choose, cost_of
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.report import GridPoint, SideEffect
from compile_steer.validation.side_effects import askable, measure_side_effects
from compile_steer.validation.verdict import decide
from tests.helpers.tiny import loaded
from tests.helpers.validation import behaviour, chat_model, context, options, program_at, usual_validation
from tests.unit.test_verdict import good

FRENCH = "Le chat est dans la maison et il ne dort pas."


def measured(monkeypatch: pytest.MonkeyPatch, base: list[str], steered: list[str]) -> dict[str, SideEffect]:
    """The side effects where the control prompts and instructions, in this order, are answered so."""
    real = measure_side_effects.__globals__["answer"]

    def answered(model: Any, requests: Any, score: Any, tokens: int) -> list[Answers]:
        answers: list[Answers] = real(model, requests, score, tokens)
        if tokens != 5:  # plain questions
            return answers
        return [replace(one, texts=texts) for one, texts in zip(answers, (base, steered), strict=True)]

    monkeypatch.setattr("compile_steer.validation.side_effects.answer", answered)
    evaluator = ContrastEvaluator(chat_model(), behaviour().test[:2], behaviour().neutral[:2], QUESTIONS[:8])
    effects, remarks = measure_side_effects(context(), options(), program_at(2, 1.6), evaluator, QUESTIONS[:8])
    assert remarks == []
    return {effect.key: effect for effect in effects}


def test_refusals_languages_and_instructions_are_told_from_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    helpful = ["It is so in the end, and that is all.", "That is it.", "It is in the sea.", "The end."]
    follows = ["The bridge is old.", "Apples and pears.", "We are tired.", '"A book of words."']
    effects = measured(
        monkeypatch,
        [*helpful, *follows],
        ["I'm sorry, but I can't.", "As an AI language model, no.", FRENCH, "End.", "The ship is old.", *follows[1:]],
    )
    assert list(effects) == ["answers", "right_answers", "refusals", "language", "instructions"]
    assert (effects["refusals"].base, effects["refusals"].steered, effects["refusals"].n) == (1.0, 0.5, 4)
    assert effects["language"].lost.value == pytest.approx(1 / 8), "too few small words are no other language"
    assert (effects["instructions"].base, effects["instructions"].steered) == (1.0, 0.75)
    assert effects["answers"].lost.value == 0.0, "the tiny model knows nothing, so that it has nothing to lose"
    likely = ContrastEvaluator(chat_model(), behaviour().test[:2], (), QUESTIONS[:8])
    expected = float((likely.base_right - likely.right_answers(program_at(2, 1.6))).mean())
    assert effects["right_answers"].lost.value == pytest.approx(expected, abs=1e-6)


def test_the_language_is_that_of_the_small_words_or_of_the_script() -> None:
    assert languages(FRENCH) == {"French"} and languages("Das ist ein Haus und nicht der Hof.") == {"German"}
    assert languages("Это дом.") == {"Cyrillic"} and languages("Paris!") == set()


EFFECT = SideEffect("plain answers", "answers", 48, 0.67, 0.46, Interval(0.21, 0.08, 0.35), 0.004, 0.25)


def test_a_violated_tolerance_fails_with_its_name_and_one_advice_with_a_number() -> None:
    broken = replace(EFFECT, steered=0.25, lost=Interval(0.42, 0.25, 0.56))
    report = replace(good(), side_effects=[broken], grid=[])
    verdict, reasons = decide(report, options())
    assert verdict == "fail" and len(reasons) == 2
    assert reasons[0] == (
        "steering costs more than validate.tolerances.answers allows: plain answers: 67% to 25% of 48 (lost 42 points [25, 56], "
        "p = 0.004; tolerance 25)"
    )
    assert reasons[1].startswith("advice: no cheaper point") and reasons[1].endswith(
        "(validate.tolerances.answers: 0.42)"
    )
    two = [broken, replace(broken, key="instructions", lost=Interval(0.3, 0.1, 0.5), p=0.0002)]
    reasons = decide(replace(report, side_effects=two), options())[1]
    assert "[10, 50], p < 0.001; tolerance 25)" in reasons[1]
    assert reasons[2].endswith("(validate.tolerances.answers: 0.42, validate.tolerances.instructions: 0.3)")
    cheaper = GridPoint(2, 1.0, 0.3, 1.1, score=0.3, repetition=0.0, cost=0.4)
    chosen = replace(cheaper, layer=report.layer, coefficient=report.coefficient, cost=0.9, score=0.5)
    advice = decide(replace(report, grid=[cheaper, chosen]), options())[1][-1]
    assert advice == (
        "advice: use block 2, coefficient 1, which uses 40% of what the limits allow and scores 0.30 on validation prompts"
    )
    beyond = [replace(point, cost=(point.cost or 0) + 1) for point in (cheaper, chosen)]
    advice = decide(replace(report, grid=beyond), options())[1][-1]
    assert (
        "no point of the sweep is within the limits, the nearest is block 2, coefficient 1, at 140% of them" in advice
    )


def test_a_price_within_its_tolerance_passes_and_is_named_in_the_first_line() -> None:
    chance = replace(EFFECT, name="instructions", lost=Interval(0.3, -0.1, 0.6), p=0.2)
    report = replace(good(), side_effects=[EFFECT, chance, replace(EFFECT, lost=Interval(0.02, 0.01, 0.03))])
    assert decide(report, options())[0] == "pass", "what may be chance is no reason, whatever its size"
    assert report.headline.startswith(
        "score 0.05 to 0.45; price: 21 points of plain answers, 30 points of instructions (may be chance), perplexity of"
    )


def point(coefficient: float, score: float, ratio: float, lost: float = 0.0) -> GridPoint:
    return GridPoint(2, coefficient, 0.5, ratio, p_value=0.01, score=score, repetition=0.0, lost_answers=lost)


def test_the_cheapest_point_that_reaches_the_effect_is_chosen() -> None:
    chosen = options(max_perplexity_ratio=1.5, tolerances={"right_answers": 0.2})
    near, best, far = point(1.5, 0.6, 1.1, 0.02), point(2.0, 0.7, 1.2, 0.15), point(1.0, 0.3, 1.01)
    assert cost_of(best, chosen, 0.0) == pytest.approx(0.75) and cost_of(near, chosen, 0.0) == pytest.approx(
        0.235, abs=1e-3
    )
    # One standard error of 0.7 on 12 prompts is 0.13.
    assert choose([near, best, far], chosen, 0.0, 0.0, 12) is near
    assert choose([near, best, far], chosen, 0.0, 0.0, 60) is best
    # What costs more right answers than is allowed is not chosen; if all do, the nearest is.
    damaging = replace(best, lost_answers=0.21)
    assert choose([replace(near, score=0.1), damaging], chosen, 0.0, 0.0, 12).coefficient == 1.5
    assert choose([damaging, replace(near, lost_answers=0.3)], chosen, 0.0, 0.0, 12) is damaging


def test_a_model_that_cannot_be_asked_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("llama")
    questions, remark = askable(model, 4)
    assert len(questions) == 4 and remark == ""
    monkeypatch.setattr(LoadedModel, "positions", 16)
    questions, remark = askable(model, 4)
    assert questions == () and remark.startswith("plain questions were not asked: ") and "16 positions" in remark


def test_the_report_of_a_run_has_them_all() -> None:
    report = usual_validation().report
    assert [effect.key for effect in report.side_effects] == [
        "answers",
        "right_answers",
        "refusals",
        "language",
        "instructions",
    ]
    assert report.coherence.log_perplexity is not None
    assert np.exp(report.coherence.log_perplexity.value) == pytest.approx(report.coherence.perplexity_ratio)
    assert all(point.lost_answers is not None for point in report.grid if not point.skipped)
    assert all((point.cost is None) == (point.score is None) for point in report.grid)
