"""Sides that differ in more than the behaviour are named, with figures and the cure; sound data sets are not."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compile_steer.data.behaviour import Behaviour, Question
from compile_steer.models.text import Pair, Text
from compile_steer.recipe import read_recipe
from compile_steer.scoring.base import Reply
from compile_steer.scoring.text import Keywords
from compile_steer.validation.confounds import find_confounds, on_direction
from compile_steer.validation.report import Confound
from compile_steer.validation.verdict import remarks
from tests.helpers.validation import behaviour, toward_w40, usual_validation, validated

RECIPES = Path(__file__).parents[2] / "recipes"
SCORE = Keywords(kind="keywords", patterns=(r"\b(please|kindly|thanks|grateful|welcome)\b",))
POLITE = ["please", "kindly", "thanks", "grateful", "welcome"]
BLUNT = ["now", "quick", "whatever", "enough", "obvious"]
COMMON = "the river runs past old houses and small gardens where people meet in summer for bread or music".split()  # noqa: SIM905


def score(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([SCORE.score(reply.text) for reply in replies])


def sentence(draw: random.Random, words: list[str], count: int) -> str:
    return " ".join([*draw.sample(COMMON, count), draw.choice(words)])


def polite_pairs(change: Callable[[str, str], tuple[str, str]], n: int = 40, seed: int = 1) -> list[Pair]:
    """Sound pairs, polite against blunt, of which `change` changes both sides."""
    draw, pairs = random.Random(seed), []
    for number in range(n):
        sides = change(*(sentence(draw, words, draw.randint(7, 11)) for words in (POLITE, BLUNT)))
        prompt = f"question {number}?"
        positive, negative = (Text(prompt, side) for side in sides)
        pairs.append(Pair(positive, negative, prompt))
    return pairs


def data_of(pairs: list[Pair], questions: dict[str, Question] | None = None) -> Behaviour:
    return replace(behaviour(), train=tuple(pairs), test=tuple(pairs), questions=questions or {})


def lettered(right: int, n: int = 40) -> list[Pair]:
    """Published questions as pairs: '(A)' is positive in `right` of `n`."""
    pairs = []
    for number in range(n):
        sides = ("(A)", "(B)") if number < right else ("(B)", "(A)")
        prompt = f"question {number}? (A) this (B) that"
        pairs.append(Pair(Text(prompt, sides[0]), Text(prompt, sides[1]), prompt))
    return pairs


def quiz(right: int, n: int = 40, longer: bool = False) -> Behaviour:
    """The same as questions with choices, with the right one `longer` or as long as the wrong one."""
    pairs, questions = lettered(right, n), {}
    for number, pair in enumerate(pairs):
        answer = 0 if number < right else 1
        choices = ["two words", "two words"]
        choices[answer] += " and some more" * (longer or number % 2)
        choices[1 - answer] += " and some more" * (not longer and (number // 2) % 2)
        questions[pair.prompt] = Question(pair.prompt, ("A", "B"), answer, tuple(choices))
        letters = ("A", "B") if answer == 0 else ("B", "A")
        pairs[number] = Pair(Text(pair.prompt, letters[0]), Text(pair.prompt, letters[1]), pair.prompt)
    return data_of(pairs, questions)


def other_prompts() -> list[Pair]:
    return [
        replace(pair, negative=replace(pair.negative, prompt=f"other {n}"))
        for n, pair in enumerate(polite_pairs(lambda a, b: (a, b)))
    ]


CONFOUNDED: dict[str, tuple[Behaviour, str]] = {
    "letters of pairs": (data_of(lettered(30)), "the answer A"),
    "letters of questions": (quiz(30), "the answer A"),
    "longer choices": (quiz(20, longer=True), "the length of a choice"),
    "length": (data_of(polite_pairs(lambda a, b: (f"{a} and {a}", b))), "the length"),
    "first word": (data_of(polite_pairs(lambda a, b: (f"well {a}", b))), "the first word 'well'"),
    "prompts": (data_of(other_prompts()), "different prompts"),
    "topic": (data_of(polite_pairs(lambda a, b: (f"{a} football match", f"{b} summer match"))), "the word 'football'"),
    "language": (
        data_of(polite_pairs(lambda a, b: (a, f"le chien est dans la rue {b.split()[-1]}"))),
        "the language (French)",
    ),
    "format": (data_of(polite_pairs(lambda a, b: (a.replace(" and ", ", and ") + "!", f"{b}."))), "the character !"),
    "capitals": (data_of(polite_pairs(lambda a, b: (a.title(), b))), "capital letters"),
    "line breaks": (data_of(polite_pairs(lambda a, b: ("\n".join(a.split()), b))), "line breaks"),
}


@pytest.mark.parametrize("name", CONFOUNDED)
def test_a_confounded_data_set_is_named_with_its_figure_and_cure(name: str) -> None:
    data, what = CONFOUNDED[name]
    found = [confound for _feature, confound in find_confounds(data, data.train, score, "")]
    named = [confound for confound in found if confound.name == what]
    assert named, [str(confound) for confound in found]
    assert " of 40 training pairs" in named[0].evidence and named[0].cure.endswith(".")


@pytest.mark.parametrize("seed", range(20))
def test_sound_pairs_and_balanced_letters_are_not_named(seed: int) -> None:
    for data in (
        data_of(polite_pairs(lambda a, b: (a, b), seed=seed)),
        data_of(lettered(18 + seed % 5)),
        quiz(18 + seed % 5),
    ):
        assert not find_confounds(data, data.train, score, "")


@pytest.mark.parametrize("name", ["instruct", "listening", "lowercase", "ocean"])
def test_recipes_raise_no_false_alarm(name: str) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    data = recipe.data.read(recipe.folder)
    bound = recipe.validate_.score.bind(None, data)  # type: ignore[arg-type]  # scorers of text need no model
    assert not find_confounds(data, data.train, bound, recipe.validate_.instruction)


def test_what_the_scorer_sees_or_the_positive_side_is_asked_for_is_the_behaviour() -> None:
    data = data_of(polite_pairs(lambda a, b: (f"{a.rsplit(' ', 1)[0]} please", b)))
    (seen,) = find_confounds(data, data.train, None, "")
    assert seen[1].name == "the word 'please'"
    assert not find_confounds(data, data.train, score, "")
    data, _what = CONFOUNDED["first word"]
    assert not find_confounds(data, data.train, score, "Begin with Well.")


def test_what_the_direction_does_to_a_letter_is_measured_on_test_pairs() -> None:
    data = quiz(30)
    toward_a = np.array([2.0 if pair.positive.response == "A" else -1.8 for pair in data.test])
    toward_a += np.random.default_rng(0).normal(0, 0.3, 40)
    (confound,) = on_direction(find_confounds(data, data.train, None, ""), data, data.test, toward_a)
    assert "A: the positive side alone has it in 30 of 40 training pairs" in str(
        confound
    ) and "balance_letters: true" in str(confound)
    assert "on 30 test pairs whose positive side has more of it, 10" in confound.on_test
    balanced = quiz(20)
    assert not find_confounds(balanced, balanced.train, None, "")
    signs = np.array([1.0 if pair.positive.response == "A" else -1.0 for pair in balanced.test])
    noise = np.random.default_rng(0).normal(0, 0.3, 40)
    (moved,) = on_direction([], balanced, balanced.test, 0.1 + signs + noise)
    assert moved.name == "the answer A" and "steering moves it whichever answer is right" in str(moved)
    assert not on_direction([], balanced, balanced.test, 1.0 + 0.2 * signs + noise)


def test_a_report_names_confounds_among_its_remarks() -> None:
    confound = Confound("the answer A", "30 of 40", "Swap.", "steering moves it")
    report = replace(usual_validation().report, confounds=[confound])
    assert remarks(report)[0] == "confounded with the answer A: 30 of 40; steering moves it. Swap."


def test_strange_pairs_are_measured_without_error() -> None:
    odd = [
        [],
        [Pair(Text("p", "yes"), Text("p", "no"), "p")],
        [Pair(Text(f"p{n}", "\x1b\u202e" if n % 2 else ""), Text(f"p{n}", "...!"), f"p{n}") for n in range(4)],
        [
            Pair(Text(f"p{n}", f"谢谢你的帮助{c}"), Text(f"p{n}", f"不{c}"), f"p{n}")
            for n, c in enumerate("天地人山水火木金土")
        ],
        [Pair(Text(f"p{n}", f"({'AB'[n % 2]})"), Text(f"p{n}", f"({'BA'[n % 2]})"), f"p{n}") for n in range(12)],
    ]
    for pairs in odd:
        data = data_of(pairs)
        on_direction(find_confounds(data, pairs, score, ""), data, pairs, np.ones(len(pairs)))
    found = find_confounds(data_of(odd[3]), odd[3], None, "")
    assert {"the length"} == {confound.name for _feature, confound in found}
    many = polite_pairs(lambda a, b: (f"well {a}", b), n=5000)
    ((feature, confound),) = find_confounds(data_of(many), many, None, "")
    assert feature.name == "the first word 'well'" and "455 of 455 training pairs" in confound.evidence


def test_the_stage_measures_the_pairs_that_the_direction_was_found_from() -> None:
    report = usual_validation().report
    assert {"the first word 'w40'", "the length"} <= {confound.name for confound in report.confounds}
    assert any("the first word 'w40'" in note and "the test cannot tell" in note for note in report.notes)
    foreign = validated(toward_w40(controls="from other rows of its file"), coefficients=[0.5]).report
    assert foreign.confounds == []
