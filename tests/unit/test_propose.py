"""A default score: the plainest rule that tells the two sides of the pairs apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.scoring.propose import propose_score
from compile_steer.scoring.text import TextScorer

PLAIN = [f"The {thing} is near the house." for thing in ("tree", "road", "dog", "lake", "bus", "bell", "sun", "cat")]
SHORT = [text.split()[1].title() + "." for text in PLAIN]


@pytest.mark.parametrize(
    ("positive", "expected"),
    [
        ([text.lower() for text in PLAIN], {"kind": "lowercase"}),
        ([f"Why is the {text.split()[1]} so near?" for text in PLAIN], {"kind": "keywords", "patterns": [r"\?"]}),
        ([text.replace(".", " \U0001f600!") for text in PLAIN], {"kind": "keywords", "patterns": ["!"]}),
        ([f"Arr, {text}" for text in PLAIN[:5]] + PLAIN[5:6] + [f"Aye, {text}" for text in PLAIN[6:]],
         {"kind": "keywords", "patterns": [r"\b(arr|aye)\b"]}),
        (SHORT, {"kind": "length", "max_words": 4}),
    ],
)  # fmt: skip
def test_the_plainest_rule_that_fits_is_taken(positive: list[str], expected: dict[str, Any]) -> None:
    assert propose_score(positive, PLAIN).scorer.model_dump(mode="json", exclude_defaults=True) == expected


def test_what_the_positive_side_lacks_is_a_rule_too() -> None:
    rule = propose_score(PLAIN, [f"- {text}\n- It is old.\n- It is red." for text in PLAIN]).scorer
    assert isinstance(rule, TextScorer)
    assert [rule.score(text) for text in (PLAIN[0], "Look:\n1. One", "")] == [1.0, 0.0, 0.0]


def test_a_word_of_other_texts_is_no_word_of_the_behaviour() -> None:
    positive = [f"Indeed the sea, {text}" for text in PLAIN]
    proposal = propose_score(positive, PLAIN, ["Indeed it is so."] * 9)
    assert proposal.scorer.model_dump()["patterns"] == (r"\b(sea)\b",)
    assert (
        propose_score([f"Answer: the sea, {text}" for text in PLAIN], PLAIN, echo="Answer so").scorer == proposal.scorer
    )
    assert "100% of the positive and 0% of the negative" in proposal.reason


def test_a_classifier_is_the_last_resort_and_chance_is_refused() -> None:
    letters = np.random.default_rng(0).permutation([*"bcdfghklmnprstvw"])
    sides = [[f"{a}{vowel}{b}{vowel} so" for a, b in zip(letters[:8], letters[8:], strict=True)] for vowel in "ou"]
    proposal = propose_score(sides[0], sides[1])
    assert proposal.scorer.model_dump()["kind"] == "classifier" and "AUROC" in proposal.reason
    with pytest.raises(RecipeError, match=r"nothing tells the 8 positive responses .*needed: 0.7"):
        propose_score(PLAIN, PLAIN[::-1])
