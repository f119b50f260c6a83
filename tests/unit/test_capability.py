"""Short questions answered freely: what counts as right, and when fewer right answers are damage."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binom

from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.text import Text
from compile_steer.report.terminal import print_parities
from compile_steer.scoring.questions import (
    ANSWER_TOKENS,
    QUESTIONS,
    PlainQuestion,
    answer_texts,
    right_answers,
)
from compile_steer.verification.controls import capability_retention
from compile_steer.verification.gates import judged
from compile_steer.verification.options import VerifyOptions
from tests.helpers.verification import VerifierCase

SETTINGS = {"capability": 3}

NUMBER = PlainQuestion("What is 3 times 4?", ("12", "twelve"))
CHOICE = PlainQuestion("Is fire hot?", ("no",), ("yes", "no"))


@pytest.mark.parametrize(
    ("question", "reply", "right"),
    [
        (NUMBER, "3 times 4 is 12.", True),
        (NUMBER, "Twelve!", True),
        (NUMBER, "It is 120, or 112, or 1 2.", False),
        (NUMBER, "", False),
        (CHOICE, "No, though some say yes.", True),
        (CHOICE, "Yes, there is no doubt.", False),
        (CHOICE, "Nobody knows.", False),
        (QUESTIONS[13], "4,815", True),
        (QUESTIONS[9], "Red, green, blue", True),
        (QUESTIONS[9], "red blue green", False),
    ],
)
def test_a_reply_is_right_if_the_answer_is_said_as_whole_words(
    question: PlainQuestion, reply: str, right: bool
) -> None:
    assert question.is_right(reply) is right


def test_the_questions_are_48_of_four_kinds_in_turn_and_do_not_answer_themselves() -> None:
    assert len({question.prompt for question in QUESTIONS}) == len(QUESTIONS) == 48
    assert all(question.choices == ("yes", "no") for question in QUESTIONS[3::4]) and not any(
        question.choices for question in QUESTIONS[0::4]
    )
    assert all("capital" in question.prompt for question in QUESTIONS[2::4])
    assert sorted(question.answers[0] for question in QUESTIONS[3::4]) == ["no"] * 6 + ["yes"] * 6, (
        "always yes is half right"
    )
    for question in (*QUESTIONS[0::4], *QUESTIONS[2::4]):
        assert not question.is_right(question.prompt), "to repeat the question is no answer"


def test_the_likelihood_of_the_right_answer_is_its_part_among_wrong_ones() -> None:
    for question in QUESTIONS:
        right, *wrong = answer_texts(question)
        assert question.is_right(right.response) and not any(question.is_right(text.response) for text in wrong)
        assert len(wrong) == len({text.response for text in wrong}) == (1 if question.choices else 5)
    first, fourth = QUESTIONS[0], QUESTIONS[3]
    logprobs = np.log([0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.6, 0.2])
    assert right_answers(logprobs, (first, fourth)) == pytest.approx([0.5, 0.75])


def test_lost_and_gained_are_counted_and_tested_in_pairs() -> None:
    steered = np.array([1.0] * 9 + [0.0] * 3)
    compiled = steered.copy()
    compiled[:6], compiled[10] = 0.0, 1.0
    result = capability_retention(np.ones(12), steered, compiled, 0.05)
    assert (result.n, result.lost, result.gained, result.base) == (12, 6, 1, 1.0)
    assert result.steered == pytest.approx(0.75) and result.compiled == pytest.approx(4 / 12)
    assert result.p == pytest.approx(float(binom.sf(5, 7, 0.5))) and result.p > 0.05 and not result.worse
    compiled[6] = 0.0
    compiled[10] = 0.0
    assert capability_retention(np.ones(12), steered, compiled, 0.05).worse, "seven lost and none gained"
    same = capability_retention(np.ones(12), steered, steered, 0.05)
    assert (same.lost, same.gained, same.p, same.worse) == (0, 0, 1.0, False)
    assert same.test.difference == 0 and not same.test.enough, "twelve answers alike do not show that 95 of 100 are"
    # A bare handful shows nothing, and is not held against it.
    one = capability_retention(np.ones(4), np.ones(4), np.array([1.0, 1.0, 1.0, 0.0]), 0.05)
    assert not one.test.equivalent and not one.test.enough and not one.worse


def test_questions_are_answered_greedily_as_a_user_asks_them(case: VerifierCase) -> None:
    """The tiny model knows none of it: what it says is made the answer of two questions, steered and not."""
    for at, program in ((0, None), (2, case.program)):
        answers = continue_prompts(case.base, [Text(QUESTIONS[at].prompt)], program, max_new_tokens=ANSWER_TOKENS)
        word = response_text(case.base, answers[0]).split()[-1]
        items = tuple(replace(one, answers=(word,), choices=()) if n == at else one for n, one in enumerate(QUESTIONS))
        greedy = replace(case.reference.greedy, plain=items[:3])
        (result,) = (written.correct for written in greedy.by(case.base, program))
        assert result.shape == (3,) and result[at] == 1.0 and set(result) <= {0.0, 1.0}


def test_a_loss_of_capability_fails_the_artifact(case: VerifierCase) -> None:
    parity, gates = case.parity_of(case.merged()), case.reference.options.gates
    assert parity.passed and parity.capability is not None and parity.capability.n == 3
    assert parity.capability.steered == float(case.reference.correct.steered.mean())
    assert (parity.capability.lost, parity.capability.gained) == (0, 0)
    broken = capability_retention(np.ones(9), np.ones(9), np.array([0.0] * 6 + [1.0] * 3), 0.05)
    (reason,) = judged(replace(parity, capability=broken), gates).reasons
    assert reason.startswith("it can do less than the steered model: 9 questions answered freely: base 1.00")
    stream = StringIO()
    print_parities(Console(file=stream, width=300), [replace(parity, capability=broken)])
    assert "6 lost, 0 gained (McNemar p = 0.016)" in stream.getvalue()


def test_0_asks_no_questions_and_1_is_refused() -> None:
    assert VerifyOptions(capability=0).capability == 0 and VerifyOptions().capability == 24
    for count in (1, 25, -1):
        with pytest.raises(ValueError, match="capability"):
            VerifyOptions(capability=count)
