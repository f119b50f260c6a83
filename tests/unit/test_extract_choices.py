"""PASf, iPASa and iPASwo against their definitions, written out item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour, Question
from compile_steer.extraction.choices import Item, choose, mean_sides, read_items, relabelled, with_controls
from compile_steer.extraction.options import ChoiceMethod, ExtractOptions
from compile_steer.models.forward import read_activations
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode
from compile_steer.steering.sites import Point
from tests.helpers.extraction import extract_with
from tests.helpers.tiny import HIDDEN, LAYERS, loaded

METHODS: tuple[ChoiceMethod, ...] = ("pasf", "ipasa", "ipaswo")
LETTERS = ("w30", "w41", "w52")


def question(n: int, answer: int, letters: tuple[str, ...] = LETTERS) -> Question:
    return Question(f"w{6 + n} w{7 + 2 * n} w{70 - n}", letters, answer)


def questions(n: int = 12, right: int = 5, seed: int = 0) -> list[Question]:
    """Questions of two and three letters of which the tiny model answers the first `right` right."""
    plain = [question(k, 0, LETTERS[: 2 + k % 2]) for k in range(n)]
    own = choose(loaded("llama"), plain)
    generator = torch.Generator().manual_seed(seed)
    answers = [
        own_answer
        if k < right
        else (own_answer + 1 + int(torch.randint(len(entry.letters) - 1, (), generator=generator))) % len(entry.letters)
        for k, (entry, own_answer) in enumerate(zip(plain, own, strict=True))
    ]
    return [replace(entry, answer=answer) for entry, answer in zip(plain, answers, strict=True)]


def behaviour(items: Sequence[Question]) -> Behaviour:
    pairs = []
    for n, entry in enumerate(items):
        wrong = entry.letters[(entry.answer + 1) % len(entry.letters)]
        pairs.append(Pair(Text(entry.prompt, entry.letters[entry.answer]), Text(entry.prompt, wrong), f"plain {n}"))
    by_prompt = {f"plain {n}": entry for n, entry in enumerate(items)}
    neutral = (Text("w8 w9", "w10 w11 w12"), Text("w13", "w14 w15"))
    return Behaviour(tuple(pairs), (), (), neutral, (), (), {}, questions=by_prompt)


def at_letter(entry: Question, index: int, point: Point = "resid_post") -> Tensor:
    """[L, d] at the letter, from a text of its own."""
    text = Text(entry.prompt, entry.letters[index])
    return read_activations(loaded("llama"), [text], point=point, readout="response_mean")[0]


def test_the_choice_is_the_letter_whose_logit_is_the_largest() -> None:
    tiny = loaded("llama")
    quiz = questions()
    for entry, chosen in zip(quiz, choose(tiny, quiz), strict=True):
        ids = torch.tensor([encode(tiny.tokenizer, Text(entry.prompt)).ids])
        with torch.no_grad():
            logits = tiny.model(input_ids=ids).logits[0, -1]
        scores = [float(logits[int(letter[1:])]) for letter in entry.letters]
        assert chosen == scores.index(max(scores))


def test_pasf_is_right_minus_the_mean_of_the_wrong_answers_over_all_questions() -> None:
    quiz = questions(6, right=2)
    expected = torch.zeros(LAYERS, HIDDEN)
    for entry in quiz:
        others = [at_letter(entry, n) for n in range(len(entry.letters)) if n != entry.answer]
        expected += (at_letter(entry, entry.answer) - torch.stack(others).mean(dim=0)) / len(quiz)
    directions = extract_with(loaded("llama"), behaviour(quiz), method="pasf")
    assert torch.allclose(directions.vectors, expected, atol=1e-4)
    assert directions.operation == "add"


def test_ipasa_is_its_own_answers_where_right_against_where_wrong() -> None:
    quiz = questions(9, right=4)
    own = choose(loaded("llama"), quiz)
    right = [
        at_letter(entry, own_answer) for entry, own_answer in zip(quiz, own, strict=True) if own_answer == entry.answer
    ]
    wrong = [
        at_letter(entry, own_answer) for entry, own_answer in zip(quiz, own, strict=True) if own_answer != entry.answer
    ]
    assert (len(right), len(wrong)) == (4, 5)
    directions = extract_with(loaded("llama"), behaviour(quiz), method="ipasa")
    assert torch.allclose(directions.vectors, torch.stack(right).mean(0) - torch.stack(wrong).mean(0), atol=1e-4)


def test_ipaswo_is_the_right_against_its_own_answer_where_that_is_wrong() -> None:
    quiz = questions(9, right=4)
    own = choose(loaded("llama"), quiz)
    differences = [
        at_letter(entry, entry.answer) - at_letter(entry, own_answer)
        for entry, own_answer in zip(quiz, own, strict=True)
        if own_answer != entry.answer
    ]
    directions = extract_with(loaded("llama"), behaviour(quiz), method="ipaswo")
    assert torch.allclose(directions.vectors, torch.stack(differences).mean(0), atol=1e-4)


def test_off_by_one_reads_the_block_s_input_and_steers_its_output() -> None:
    quiz = questions(8, right=3)
    plain, shifted = (
        extract_with(loaded("llama"), behaviour(quiz), method="pasf", off_by_one=shift) for shift in (False, True)
    )
    assert torch.allclose(shifted.vectors[1:], plain.vectors[:-1], atol=1e-5)
    assert shifted.point == "resid_post"
    assert shifted.program(2, 1.7, "last_prompt").interventions[0].site.point == "resid_post"


def test_a_clamp_sets_the_mean_projection_of_the_positive_side() -> None:
    quiz = questions(7, right=3)
    directions = extract_with(loaded("llama"), behaviour(quiz), method="pasf", operation="clamp")
    positive = torch.stack([at_letter(entry, entry.answer) for entry in quiz]).mean(dim=0)
    intervention = directions.program(1, 0.7, "last_prompt").interventions[0]
    assert intervention.operation == "clamp"
    assert intervention.projection == pytest.approx(float(positive[1] @ intervention.vector), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_labels_carry_no_information(method: ChoiceMethod) -> None:
    """Where every item carries the same difference, what is left of it under shuffled labels is small."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
    items = []
    for n in range(40):
        noise = 0.3 * torch.randn(3, 2, HIDDEN, generator=generator)
        answer, own = n % 3, n % 3 if n % 2 else (n + 1 + n // 3 % 2) % 3
        noise[answer] += 2.5 * unit
        items.append(Item(noise, answer, own))
    directions = with_controls(items, method, 7, seed=5)
    assert torch.nn.functional.cosine_similarity(directions.vectors, unit.expand(2, -1)).min() > 0.95
    assert tuple(directions.shuffled.shape) == (7, 2, HIDDEN)
    assert bool((directions.shuffled.norm(dim=-1) < 0.6 * directions.vectors.norm(dim=-1)).all())
    cosines = torch.nn.functional.cosine_similarity(directions.shuffled, unit.expand(7, 2, -1), dim=-1)
    raw = [mean_sides(relabelled(items, method, generator), method) for _ in range(20)]
    sizes = torch.stack([(high - low) @ unit for high, low in raw]).abs().mean()
    assert float(sizes) < 0.35 * float(directions.vectors[0] @ unit)
    assert float(cosines.max() - cosines.min()) > 0.05
    assert torch.equal(directions.shuffled, with_controls(items, method, 7, seed=5).shuffled)
    assert not torch.equal(directions.shuffled, with_controls(items, method, 7, seed=6).shuffled)


def test_every_item_of_ipasa_counts_on_the_side_that_the_shuffled_labels_say() -> None:
    items = read_items(loaded("llama"), questions(8, right=3), "resid_post", lambda _n: None)
    other = relabelled(items, "ipasa", torch.Generator().manual_seed(2))
    assert sum(item.right == item.own for item in other) == 3
    assert [item.own for item in other] == [item.own for item in items]


@pytest.mark.parametrize(
    ("method", "right", "message"),
    [
        (
            "ipasa",
            8,
            "answers 8 of 8 training questions right and 0 wrong; needed: at least 2 that it answers right and 2",
        ),
        ("ipasa", 0, "answers 0 of 8 training questions right and 8 wrong.*or easier questions"),
        ("ipaswo", 7, "answers 7 of 8 training questions right and 1 wrong; needed: at least 2 that it answers wrong"),
    ],
)
def test_too_few_right_or_wrong_answers_are_refused(method: ChoiceMethod, right: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        extract_with(loaded("llama"), behaviour(questions(8, right=right)), method=method)


def test_all_wrong_is_enough_for_ipaswo() -> None:
    directions = extract_with(loaded("llama"), behaviour(questions(8, right=0)), method="ipaswo")
    assert float(directions.vectors.norm(dim=-1).min()) > 0.01


def test_data_that_are_no_questions_are_refused() -> None:
    tiny = loaded("llama")
    same = [question(n, 1) for n in range(5)]
    with pytest.raises(RecipeError, match="the right answer is w41 in all 5 questions"):
        extract_with(tiny, behaviour(same), method="pasf")
    with pytest.raises(RecipeError, match=r"data\.train has none; give rows of question, choices"):
        extract_with(tiny, behaviour([]), method="pasf")
    with pytest.raises(RecipeError, match=r"extract\.pairs: found 12 questions in data\.train; needed: 30"):
        extract_with(tiny, behaviour(questions()), method="pasf", pairs=30)
    for letters in (("w30 w31", "w41"), ("nothing", "else")):  # two tokens; one and the same
        quiz = [question(n, n % 2, letters) for n in range(4)]
        with pytest.raises(RecipeError, match="needs letters that are one token each"):
            extract_with(tiny, behaviour(quiz), method="pasf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pasf", "readout": "last_prompt"}, "reads the letter that is the response"),
        ({"operation": "clamp", "length": "unit"}, "a clamp has no length"),
        ({"operation": "ablate", "length": "unit"}, "an ablation has no length"),
        ({"operation": "ablate", "method": "trained"}, "use operation add"),
        ({"operation": "ablate", "point": "mlp_out"}, "read it at point resid_post, not mlp_out"),
        ({"off_by_one": True, "point": "mlp_out"}, "off_by_one is about activations at resid_post"),
        ({"method": "imported"}, "needs extract.imported.file"),
        ({"imported": {"file": "sae"}}, "these options are of method imported, not of mean_difference"),
        ({"method": "imported", "imported": {"file": "v"}, "operation": "clamp"}, "method imported has none"),
        ({"method": "imported", "imported": {"file": "v"}, "point": "mlp_out"}, "leave out extract.point"),
        ({"method": "imported", "imported": {"file": "v", "joint": "all"}, "operation": "ablate"}, "one direction at"),
        ({"method": "imported", "imported": {"file": "v", "joint": [2, 2]}}, "each once, or 'all'"),
        ({"method": "imported", "imported": {"file": "v"}, "off_by_one": True}, "off_by_one is about activations"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractOptions.model_validate(options)
