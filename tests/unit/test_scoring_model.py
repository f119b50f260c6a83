"""Scorers that need a model, data or each other, and the check before a sweep; each with what it gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Question
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.recipe import read_recipe
from compile_steer.scoring.base import Reply, ScorerBase
from compile_steer.scoring.model_based import perplexities
from compile_steer.stats import auroc
from tests.helpers.scoring import behaviour, discrimination, make_replies, make_scorer
from tests.helpers.tiny import loaded, tokenizer

MODEL = loaded("gemma2")
NONE = behaviour(())


def scores(scorer: ScorerBase, *texts: str, **how: Any) -> list[float]:
    return list(scorer.bind(MODEL, NONE)(make_replies(*texts, **how)))


def perplexity_by_hand(prompt: str, text: str) -> float:
    """Of the words of `text` after those of `prompt`, from the model's plain logits."""
    words = tokenizer()(f"{prompt} {text}")["input_ids"]
    start = len(tokenizer()(prompt)["input_ids"])
    with torch.no_grad():
        log_p = MODEL.model(input_ids=torch.tensor([words])).logits[0].double().log_softmax(dim=-1)
    return float(np.exp(-np.mean([float(log_p[at - 1, words[at]]) for at in range(start, len(words))])))


def greedy(prompt: str, count: int) -> str:
    """What the model itself says: the most predictable text there is."""
    ids = list(encode(MODEL.tokenizer, Text(prompt)).ids)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(MODEL.model(input_ids=torch.tensor([ids])).logits[0, -1, 6:].argmax()) + 6)
    return " ".join(f"w{n}" for n in ids[start:])


def test_max_perplexity_is_after_the_prompt_and_min_of_the_text_alone() -> None:
    texts = ["w9 w30 w7", "w20", greedy("w8 w50", 5), "w11 w12 w90 w33"]
    after = [perplexity_by_hand("w8 w50", text) for text in texts]
    alone = [perplexity_by_hand("<s>", text) for text in texts]
    replies = make_replies(*texts, prompt="w8 w50")
    assert list(perplexities(MODEL, replies)) == pytest.approx(after, rel=1e-4)
    assert list(perplexities(MODEL, replies, alone=True)) == pytest.approx(alone, rel=1e-4)
    assert np.argsort(after).tolist() != np.argsort(alone).tolist(), "otherwise the two could be exchanged unseen"
    high, low = sum(sorted(after)[1:3]) / 2, sum(sorted(alone)[1:3]) / 2
    below, above = [value <= high for value in after], [value >= low for value in alone]
    assert scores(make_scorer(kind="perplexity", max=high), *texts, prompt="w8 w50") == below
    assert scores(make_scorer(kind="perplexity", min=low), *texts, prompt="w8 w50") == above
    both = [a and b for a, b in zip(below, above, strict=True)]
    assert scores(make_scorer(kind="perplexity", min=low, max=high), *texts, prompt="w8 w50") == both


def test_an_empty_text_fails_perplexity() -> None:
    assert scores(make_scorer(kind="perplexity", max=1e9), "", " ", "w9", prompt="w8") == [0.0, 0.0, 1.0]
    assert scores(make_scorer(kind="perplexity", min=1.001), "", " ", "w9", prompt="w8") == [0.0, 0.0, 1.0]


def test_perplexity_passes_the_model_s_own_text() -> None:
    own = greedy("w8 w50", 6)
    limit = make_scorer(kind="perplexity", max=0.5 * perplexity_by_hand("w8 w50", "w9 w30 w7 w60 w11 w41"))
    assert scores(limit, own, "w9 w30 w7 w60 w11 w41", prompt="w8 w50") == [1.0, 0.0]


def test_ended_scores_empty_replies_too() -> None:
    scorer = make_scorer(kind="ended")
    assert scores(scorer, "w9", "", ended=True) == [1.0, 1.0]
    assert scores(scorer, "w9", ended=False) == [0.0]


SEA = [
    (f"The waves of the {w} roll to the shore {w}.", f"The plan of the {w} goes to the office {w}.") for w in "abcdefgh"
]
HELD_OUT = [("A wave rolls on the shore.", "A plan goes on."), ("Waves roll ashore.", "The office plans."),
            ("On the shore.", "In the office."), ("The waves.", "The plans.")]  # fmt: skip


def test_a_classifier_learns_the_two_sides() -> None:
    score = make_scorer(kind="classifier").bind(MODEL, behaviour(HELD_OUT, SEA))
    rated = score(make_replies("The shore has waves that roll.", "The office has plans.", "", " "))
    assert rated[0] > 0.6 and 0.0 < rated[1] < 0.4
    assert list(rated[2:]) == [0.0, 0.0]
    assert score([]).shape == (0,)
    again = make_scorer(kind="classifier").bind(MODEL, behaviour(HELD_OUT, SEA))
    assert list(again(make_replies("The shore has waves that roll."))) == [rated[0]]


def test_a_classifier_with_a_low_auroc_is_refused() -> None:
    random = np.random.default_rng(3)
    words = [" ".join(f"w{n}" for n in random.integers(0, 40, 12)) for _ in range(80)]
    noise = list(zip(words[:40], words[40:], strict=True))
    with pytest.raises(
        RecipeError, match=r"cannot tell the two sides .* AUROC 0\.[3-6]\d on its 40 responses; needed 0\.7"
    ):
        make_scorer(kind="classifier").bind(MODEL, behaviour(noise[:20], noise[20:]))
    with pytest.raises(RecipeError, match=r"AUROC 0\.00"):
        make_scorer(kind="classifier").bind(MODEL, behaviour([(n, p) for p, n in HELD_OUT], SEA))


def test_a_classifier_learns_the_topic_if_the_sides_differ_in_it() -> None:
    score = make_scorer(kind="classifier").bind(MODEL, behaviour(HELD_OUT, SEA))
    denied, unrelated = score(make_replies("There are no waves and no shore here.", "Quantum chromodynamics!"))
    assert denied > 0.55, "a denial is of the subject"
    assert 0.3 < unrelated < 0.7, "text unlike either side is near chance, which is not 0"


def test_a_classifier_needs_responses() -> None:
    with pytest.raises(RecipeError, match="needs the responses of both sides; data.train has prompts without"):
        make_scorer(kind="classifier").bind(MODEL, behaviour(HELD_OUT, [("", "")]))
    with pytest.raises(RecipeError, match="data.validation has prompts without"):
        make_scorer(kind="classifier").bind(MODEL, behaviour([("", "")], SEA))


def test_all_is_the_minimum_of_its_parts() -> None:
    scorer = make_scorer(
        kind="all", all_of=[{"kind": "keywords", "patterns": ["sea"]}, {"kind": "repetition", "max": 0.2}]
    )
    assert scores(scorer, "the sea is near", "the hill is near", "sea " * 20, "hill " * 20) == [1.0, 0.0, 0.0, 0.0]
    graded = make_scorer(kind="all", all_of=[{"kind": "classifier"}, {"kind": "length", "max_words": 4}])
    score, alone = (scorer.bind(MODEL, behaviour(HELD_OUT, SEA)) for scorer in (graded, make_scorer(kind="classifier")))
    replies = make_replies("The waves.", "The waves of the shore roll.", "The plans.")
    assert list(score(replies)) == [alone(replies)[0], 0.0, alone(replies)[2]]
    assert len(score([])) == 0


def test_all_is_zero_if_one_part_never_fires() -> None:
    scorer = make_scorer(
        kind="all", all_of=[{"kind": "keywords", "patterns": ["sea"]}, {"kind": "length", "max_words": 1}]
    )
    assert scores(scorer, "the sea", "a sea of troubles", "the hill") == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------- before the sweep

SIDES = [("the sea and sun", "the hill"), ("a hill by the sea", "a sea"), ("the river", "the road")]


QUESTIONS = {f"validation {n}": Question("w9", ("w20", "w21"), n % 2) for n in range(len(SIDES))}


def checked(sides: Any = SIDES, **settings: Any) -> str:
    return discrimination(make_scorer(**settings), MODEL, behaviour(sides, questions=QUESTIONS))


def test_a_score_that_discriminates_passes() -> None:
    assert checked(kind="keywords", patterns=["sea"]) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"kind": "keywords", "patterns": ["desert"]},
            "gives 0.00 to all 6 texts of data.validation, on both sides: it never",
        ),
        (
            {"kind": "length", "max_words": 99},
            "gives 1.00 to all 6 texts of data.validation, on both sides: it always fires",
        ),
        (
            {"kind": "keywords", "patterns": ["road", "^the hill"]},
            "more than the positive ones, 0.67 and 0.00 on average",
        ),
        ({"kind": "repetition"}, "it always fires"),
        (
            {"kind": "all", "all_of": [{"kind": "ended"}, {"kind": "keywords", "patterns": ["desert"]}]},
            "it never fires",
        ),
        (
            {
                "kind": "all",
                "all_of": [{"kind": "length", "min_words": 4}, {"kind": "length", "max_words": 3}, {"kind": "choice"}],
            },
            "it never fires",
        ),
    ],
)
def test_a_score_that_does_not_discriminate_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        checked(**settings)
    assert words in str(caught.value)


_JUDGE = {"kind": "judge", "base_url": "http://127.0.0.1:9/v1", "model": "m", "prompt": "{reply}"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "ended"}, "do not show whether a model ends its turn"),
        ({"kind": "choice"}, "a choice is made by the model"),
        ({"kind": "perplexity", "max": 30}, "differs from that of given texts"),
        (_JUDGE, "cost requests"),
        (
            {"kind": "all", "all_of": [{"kind": "ended"}, _JUDGE]},
            "ends its turn; a judge's answers cost",
        ),
    ],
)
def test_scorers_that_cannot_score_texts_are_skipped_with_a_reason(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path))
    assert words in checked(**settings)


def test_data_that_cannot_be_scored_are_refused_before_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_API_KEY", raising=False)
    with pytest.raises(RecipeError, match="GRADER_API_KEY is not set"):
        checked(**_JUDGE, api_key_env="GRADER_API_KEY")
    with pytest.raises(RecipeError, match="not multiple-choice questions"):
        checked([*SIDES, ("more", "than asked")], kind="choice")


def test_pairs_without_responses_of_their_own_are_skipped() -> None:
    assert "the same responses, or none" in checked([("", ""), ("", "")], kind="lowercase")
    assert "the same responses, or none" in checked([("A", "A"), ("b", "b")], kind="lowercase")


def test_the_parts_of_all_that_can_score_texts_are_checked_together() -> None:
    """Two of the three parts can, and no text of these satisfies both; the third cannot and does not count."""
    sides = [("the sea", "the hill and the road"), ("a sea", "a long road home")]
    parts = [{"kind": "ended"}, {"kind": "keywords", "patterns": ["sea"]}, {"kind": "length", "min_words": 3}]
    with pytest.raises(RecipeError, match="it never fires"):
        checked(sides, kind="all", all_of=parts)
    assert checked(sides, kind="all", all_of=parts[:2]) == checked(sides, kind="keywords", patterns=["sea"]) == ""


def test_scores_of_the_shipped_recipes_discriminate() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = read_recipe(path)
        scorer = recipe.validate_.score
        if scorer.kind in ("keywords", "lowercase", "length", "repetition", "ifeval"):
            data = recipe.data.read(recipe.folder)
            if not discrimination(scorer, MODEL, data):
                texts = [Reply(p.prompt, p.positive.response, True) for p in data.validation]
                texts += [Reply(p.prompt, p.negative.response, True) for p in data.validation]
                assert auroc(*np.split(scorer.bind(MODEL, data)(texts), 2)) > 0.6, path.name
