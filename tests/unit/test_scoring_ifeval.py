"""IFEval's constraints: by the library's checkers, the same every time, and refused where they cannot be checked."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import nltk
import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Check
from tests.helpers.scoring import behaviour, discrimination, make_replies, make_scorer
from tests.helpers.tiny import loaded

MODEL = loaded("llama")
COMMA, TITLE = "punctuation:no_comma", "detectable_format:title"


def scores(text: str, id: str, loose: bool = False, **arguments: Any) -> float:
    scorer = make_scorer(kind="ifeval", id=id, arguments=arguments, loose=loose)
    (score,) = scorer.bind(MODEL, behaviour(()))(make_replies(text))
    return float(score)


@pytest.mark.parametrize(
    ("text", "id", "arguments", "score"),
    [
        ("No comma. At all!", COMMA, {}, 1.0),
        ("One, two", COMMA, {}, 0.0),
        ("all of these words are written in small letters", "change_case:english_lowercase", {}, 1.0),
        ("Not all small letters here", "change_case:english_lowercase", {}, 0.0),
        ("<<A Title>>\nand text", TITLE, {}, 1.0),
        ('{"a": 3}', "detectable_format:json_format", {}, 1.0),
        ("{a: 3", "detectable_format:json_format", {}, 0.0),
        ("a b c d", "length_constraints:number_words", {"num_words": 5, "relation": "less than"}, 1.0),
        ("a b c d", "length_constraints:number_words", {"num_words": 5, "relation": "at least"}, 0.0),
        ("* one\n* two", "detectable_format:number_bullet_lists", {"num_bullets": 2}, 1.0),
        ("The reef is near", "keywords:existence", {"keywords": ["reef", "near"]}, 1.0),
        ("The reef is far", "keywords:existence", {"keywords": ["reef", "near"]}, 0.0),
        ("The reef is far", "keywords:forbidden_words", {"forbidden_words": ["near"]}, 1.0),
        ("Das Wetter ist heute sehr schön und warm", "language:response_language", {"language": "de"}, 1.0),
        ("", COMMA, {}, 0.0),
        ("  \n", COMMA, {}, 0.0),
    ],
)
def test_one_constraint_for_all_replies(text: str, id: str, arguments: dict[str, Any], score: float) -> None:
    assert scores(text, id, **arguments) == score


@pytest.mark.parametrize("text", ["Here it is, friend:\nNo comma.", "No comma.\nBye, friend", "A,\nno comma\nB, C"])
def test_loose_forgives_the_first_and_the_last_line(text: str) -> None:
    assert (scores(text, COMMA), scores(text, COMMA, loose=True)) == (0.0, 1.0)


def test_loose_forgives_asterisks() -> None:
    starred = "<*<Title>*>"
    assert (scores(starred, TITLE), scores(starred, TITLE, loose=True)) == (0.0, 1.0)
    assert scores("a, b\nc, d\ne, f", COMMA, loose=True) == 0.0


def test_a_prompt_s_own_constraints_must_all_hold() -> None:
    checks = {
        "validation 0": (Check(COMMA), Check("keywords:existence", (("keywords", ["reef"]),))),
        "test 0": (
            Check("length_constraints:number_words", (("num_words", 3), ("relation", "less than"), ("letter", None))),
        ),
    }
    data = behaviour([("p", "n")], test=[("p", "n")], checks=checks)
    score = make_scorer(kind="ifeval").bind(MODEL, data)
    assert list(score(make_replies("A reef", "A reef, a hill", "A hill"))) == [1.0, 0.0, 0.0]
    assert list(score(make_replies("two words", "now three words", prompt="test 0"))) == [1.0, 0.0]
    scorer = make_scorer(kind="ifeval", id=COMMA).bind(MODEL, data)
    assert list(scorer(make_replies("now three words", "a, b", prompt="test 0"))) == [1.0, 0.0], (
        "the recipe's in place of the data's"
    )


def test_prompts_without_constraints_are_refused() -> None:
    data = behaviour(
        [("p", "n"), ("p", "n")], test=[("p", "n")], checks={"validation 0": (Check(COMMA),), "test 0": ()}
    )
    with pytest.raises(RecipeError, match="2 of the 3 prompts .* name no constraint, the first 'validation 1'"):
        make_scorer(kind="ifeval").bind(MODEL, data)


def refusal(id: str, **arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        scores("text", id, **arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("id", "arguments", "words"),
    [
        ("punctuation:no_coma", {}, "unknown constraint 'punctuation:no_coma'; known are change_case:"),
        (
            "keywords:existence",
            {},
            "keywords:existence needs every argument, in its range: its arguments are keywords; found {}",
        ),
        ("keywords:existence", {"keywords": "reef"}, "needs a list of words as keywords; found 'reef'"),
        ("keywords:existence", {"keywords": ["("]}, "cannot be used with {'keywords': ['(']}"),
        ("keywords:existence", {"words": ["a"]}, "unexpected keyword argument 'words'"),
        (
            "length_constraints:number_words",
            {"num_words": 5},
            "its arguments are num_words, relation; found {'num_words': 5}",
        ),
        ("length_constraints:number_words", {"num_words": 5, "relation": "about"}, "relation"),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 3, "let_relation": "at least"},
            "needs every argument, in its range",
        ),
        ("language:response_language", {"language": "xx"}, "cannot be used with {'language': 'xx'}"),
        ("combination:repeat_prompt", {}, "prompt_to_repeat must be set"),
    ],
)
def test_a_constraint_that_cannot_be_checked_is_refused_by_name(id: str, arguments: dict[str, Any], words: str) -> None:
    assert words in refusal(id, **arguments)


def test_all_unusable_constraints_are_reported_together() -> None:
    checks = {"validation 0": (Check("a:b"), Check(COMMA)), "validation 1": (Check("keywords:existence"), Check("a:b"))}
    with pytest.raises(RecipeError) as caught:
        make_scorer(kind="ifeval").bind(MODEL, behaviour([("p", "n"), ("p", "n")], checks=checks))
    assert len(caught.value.problems) == 2
    assert "a:b" in caught.value.problems[0] and "keywords:existence" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("id", "arguments"),
    [
        ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}),
    ],
)
def test_missing_nltk_data_is_refused_with_instructions(
    id: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    message = refusal(id, **arguments)
    assert id in message and "python -m nltk.downloader punkt_tab" in message


def test_a_missing_ifeval_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "if_verifiable" else find(name))
    assert "pip install 'compile-steer[ifeval]'" in refusal(COMMA)


def test_scoring_is_deterministic_and_leaves_the_random_state_alone() -> None:
    random.seed(11)
    before = random.getstate()
    # The detector draws n-grams: without a seed it takes these words for English about every third time.
    results = {scores("all small letters here", "language:response_language", language="en") for _ in range(40)}
    assert len(results) == 1
    refusal("keywords:frequency")
    assert random.getstate() == before


def test_constraints_are_wrong_where_the_docstring_warns() -> None:
    assert scores("no no no no no no no", COMMA) == 1.0
    assert scores("I will not speak of the reef.", "keywords:existence", keywords=["reef"]) == 1.0
    assert scores("a partnership", "keywords:existence", keywords=["art"]) == 1.0, "a word within a word"
    assert scores("all small letters here", "change_case:english_lowercase") == 0.0, "too short to be known as English"
    assert scores("123 456", "language:response_language", language="de") == 1.0, "no language passes as any"


def test_constraints_must_discriminate() -> None:
    sides = [("No comma here.", "A comma, here."), ("None here.", "Here, and here.")]
    assert discrimination(make_scorer(kind="ifeval", id=COMMA), MODEL, behaviour(sides)) == ""
    with pytest.raises(RecipeError, match="it never fires"):
        discrimination(make_scorer(kind="ifeval", id=TITLE), MODEL, behaviour(sides))
