"""Scores of text, and log-probabilities of responses against a plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from compile_steer.common.errors import RecipeError
from compile_steer.scoring.options import Scorer
from compile_steer.scoring.text import Keywords, Length, Lowercase, Repetition, repetition


def keywords(*patterns: str, absent: tuple[str, ...] = ()) -> Keywords:
    return Keywords(kind="keywords", patterns=patterns, absent=absent)


def test_a_pattern_without_end_is_an_error() -> None:
    with pytest.raises(
        RecipeError, match=r"the pattern '\(a\|aa\)\+\$' takes more than 1 s on a reply of 61 characters"
    ):
        keywords("(a|aa)+$").score("a" * 60 + "!")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The SEA is near.", 1.0),
        ("Many waves", 1.0),
        ("I am seated.", 0.0),
        ("", 0.0),
        ("The sea, a pool.", 0.0),
    ],
)
def test_keywords_ask_for_any_pattern_and_none_of_the_absent_ones(text: str, score: float) -> None:
    assert keywords(r"\bsea\b", "waves?", absent=("pool",)).score(text) == score


def test_a_curly_apostrophe_is_an_apostrophe() -> None:
    assert keywords("don't").score("I don\N{RIGHT SINGLE QUOTATION MARK}t") == 1.0


@pytest.mark.parametrize(
    ("text", "score"), [("all low, 3!", 1.0), ("one Upper", 0.0), ("123 ?!", 0.0), ("", 0.0), ("É", 0.0)]
)
def test_lowercase_needs_letters_and_no_upper_case(text: str, score: float) -> None:
    assert Lowercase(kind="lowercase").score(text) == score


@pytest.mark.parametrize(
    ("text", "score"), [("", 0.0), (" \n", 0.0), ("one", 1.0), ("one  two\nthree", 1.0), ("a b c d", 0.0)]
)
def test_length_counts_words_and_an_empty_answer_is_not_short(text: str, score: float) -> None:
    assert Length(kind="length", max_words=3).score(text) == score


@pytest.mark.parametrize(("text", "score"), [("", 0.0), ("a b", 0.0), ("a b c", 1.0), ("a b c d", 1.0)])
def test_length_can_ask_for_many_words_as_well(text: str, score: float) -> None:
    assert Length(kind="length", min_words=3).score(text) == score
    assert Length(kind="length", min_words=3, max_words=3).score(text) == float(score and text == "a b c")


@pytest.mark.parametrize(
    ("text", "score"), [("", 0.0), (" ", 0.0), ("a b c d e", 1.0), ("a b c a b c", 1.0), ("go " * 12, 0.0)]
)
def test_the_repetition_scorer_limits_the_fraction_and_refuses_empty_text(text: str, score: float) -> None:
    assert Repetition(kind="repetition", max=0.25).score(text) == score


def test_text_scorers_are_wrong_where_their_docstrings_warn() -> None:
    assert keywords(r"\bsea\b").score("I know nothing of the sea.") == 1.0
    assert Lowercase(kind="lowercase").score("the the the the the the") == 1.0
    assert Length(kind="length", min_words=50).score("long " * 60) == 1.0
    assert Length(kind="length", max_words=5).score("It is because of the") == 1.0, "stopped at the limit of new tokens"
    same = "the sea is wide and the ocean is broad and the water is large and the deep is vast"
    assert Repetition(kind="repetition", max=0.2).score(same) == 1.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("a b c d e", 0.0),
        ("a b c a b c", 0.25),
        ("A a a a a", 2 / 3),
        ("go " * 12, 0.9),
        ("<" * 32, 29 / 30),
        ("so " + "ab" * 11, 18 / 21),
        ("<" * 20, 0.0),
        ("你" * 24, 21 / 22),
        ("internationalization a b", 0.0),
    ],
)
def test_repetition_is_the_fraction_of_3_grams_seen_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_a_score_is_chosen_by_its_kind_and_bad_ones_are_refused() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Scorer)
    assert isinstance(adapter.validate_python({"kind": "length", "max_words": 2}), Length)
    for bad in (
        {"kind": "keywords", "patterns": []},
        {"kind": "keywords", "patterns": ["("]},
        {"kind": "keywords", "patterns": ["a"], "absent": ["["]},
        {"kind": "length", "max_words": 0},
        {"kind": "length"},
        {"kind": "length", "min_words": 5, "max_words": 4},
        {"kind": "repetition", "max": 1},
        {"kind": "perplexity"},
        {"kind": "perplexity", "max": 1},
        {"kind": "ifeval", "arguments": {"keywords": ["a"]}},
        {"kind": "classifier", "model": "folder"},
        {"kind": "classifier", "label": "ocean"},
        {"kind": "all", "all_of": [{"kind": "lowercase"}]},
        {"kind": "all", "all_of": [{"kind": "lowercase"}, {"kind": "all", "all_of": []}]},
        {"kind": "lowercase", "max_words": 2},
        {"kind": "vibes"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


@pytest.mark.parametrize(
    ("score", "able"),
    [
        ({"kind": "keywords", "patterns": ["sea"]}, True),
        ({"kind": "perplexity", "max": 9}, True),
        ({"kind": "ifeval"}, False),
        ({"kind": "ifeval", "id": "punctuation:no_comma"}, True),
        ({"kind": "choice"}, False),
        ({"kind": "judge", "base_url": "http://localhost:1/v1", "model": "m", "prompt": "{reply}?"}, False),
        ({"kind": "all", "all_of": [{"kind": "ended"}, {"kind": "lowercase"}]}, True),
        ({"kind": "all", "all_of": [{"kind": "ended"}, {"kind": "ifeval"}]}, False),
    ],
)
def test_which_scorers_need_no_labels(score: dict[str, Any], able: bool) -> None:
    assert TypeAdapter(Scorer).validate_python(score).needs_no_labels is able
