"""Scores of text, and log-probabilities of responses against a plain forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from compile_steer.models.logprobs import encode_pairs, margins, mean_logprobs
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Encoded, encode, pad
from compile_steer.scoring.options import Scorer
from compile_steer.scoring.text import Keywords, Length, Lowercase, Repetition, repetition
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from tests.helpers.tiny import PAD_ID, intervention, loaded, program, texts


def keywords(*patterns: str, absent: tuple[str, ...] = ()) -> Keywords:
    return Keywords(kind="keywords", patterns=patterns, absent=absent)


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
def test_repetition_as_a_scorer_is_a_limit_on_its_share_and_no_text_is_no_good_text(text: str, score: float) -> None:
    assert Repetition(kind="repetition", max=0.25).score(text) == score


def test_what_each_scorer_of_text_gets_wrong_is_what_its_docstring_says() -> None:
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
def test_repetition_is_the_share_of_three_grams_seen_before(text: str, share: float) -> None:
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


# -------------------------------------------------------------------------------- log-probabilities


def mean_by_hand(ids: tuple[int, ...], n_prompt: int, steering: Program | None = None) -> float:
    """Mean log-probability of the response tokens of one row, from the model's plain logits."""
    model, batch = loaded("gemma2").model, pad([Encoded(ids, n_prompt)], [0], PAD_ID)
    with torch.no_grad(), steered(model, steering, roles=batch.roles):
        log_p = model(input_ids=batch.input_ids).logits[0].double().log_softmax(dim=-1)
    return float(np.mean([float(log_p[at - 1, ids[at]]) for at in range(n_prompt, len(ids))]))


def test_mean_log_probabilities_are_those_of_each_text_alone_in_the_order_given() -> None:
    rows = texts(((5, 4), (3, 9), (4, 1), (2, 6)))
    expected = [mean_by_hand(row.ids, row.n_prompt) for row in rows]
    assert mean_logprobs(loaded("gemma2"), rows) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.1


def test_mean_log_probabilities_under_a_program() -> None:
    rows, steering = texts(), program("gemma2", intervention(positions="response"))
    plain, under = (mean_logprobs(loaded("gemma2"), rows, program) for program in (None, steering))
    assert under == pytest.approx([mean_by_hand(row.ids, row.n_prompt, steering) for row in rows], abs=1e-5)
    # The first response token is predicted at the prompt, where 'response' does not act; every row has a second one.
    assert float(np.abs(under - plain).min()) > 1e-3


def test_hooks_without_roles_take_a_whole_pass_for_a_prompt() -> None:
    rows = texts()
    with steered(loaded("gemma2").model, program("gemma2", intervention(positions="response"))):
        assert mean_logprobs(loaded("gemma2"), rows) == pytest.approx(
            [mean_by_hand(row.ids, row.n_prompt) for row in rows], abs=1e-5
        )


def test_a_margin_is_positive_minus_negative_of_each_pair_under_the_plain_prompt() -> None:
    one = loaded("gemma2")
    pairs = [Pair(Text(f"w9 w{n} w8", "w20 w21"), Text(f"w{n}", f"w3{n} w40 w41"), f"w{n} w50") for n in (6, 7, 8)]
    encoded = encode_pairs(one, pairs)
    assert [e.n_prompt for e in encoded] == [2] * 6, "the plain prompt, not the template's"
    assert encoded[1] == encode(one.tokenizer, Text("w7 w50", "w20 w21"))
    assert encoded[4] == encode(one.tokenizer, Text("w7 w50", "w37 w40 w41"))
    wanted = [mean_by_hand((n, 50, 20, 21), 2) - mean_by_hand((n, 50, 30 + n, 40, 41), 2) for n in (6, 7, 8)]
    assert margins(mean_logprobs(one, encoded)) == pytest.approx(wanted, abs=1e-5)


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
def test_replies_to_prompts_that_are_not_in_the_data_are_scored_where_that_is_possible_and_costs_nothing(
    score: dict[str, Any], able: bool
) -> None:
    assert TypeAdapter(Scorer).validate_python(score).needs_no_labels is able
