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
        mine
        if k < right
        else (mine + 1 + int(torch.randint(len(one.letters) - 1, (), generator=generator))) % len(one.letters)
        for k, (one, mine) in enumerate(zip(plain, own, strict=True))
    ]
    return [replace(one, answer=answer) for one, answer in zip(plain, answers, strict=True)]


def behaviour(items: Sequence[Question]) -> Behaviour:
    pairs = []
    for n, one in enumerate(items):
        wrong = one.letters[(one.answer + 1) % len(one.letters)]
        pairs.append(Pair(Text(one.prompt, one.letters[one.answer]), Text(one.prompt, wrong), f"plain {n}"))
    found = {f"plain {n}": one for n, one in enumerate(items)}
    neutral = (Text("w8 w9", "w10 w11 w12"), Text("w13", "w14 w15"))
    return Behaviour(tuple(pairs), (), (), neutral, (), (), {}, questions=found)


def at_letter(one: Question, index: int, point: Point = "resid_post") -> Tensor:
    """[L, d] at the letter, from a text of its own."""
    text = Text(one.prompt, one.letters[index])
    return read_activations(loaded("llama"), [text], point=point, readout="response_mean")[0]


def test_the_choice_is_the_letter_whose_logit_is_the_largest() -> None:
    one = loaded("llama")
    asked = questions()
    for asked_one, chosen in zip(asked, choose(one, asked), strict=True):
        ids = torch.tensor([encode(one.tokenizer, Text(asked_one.prompt)).ids])
        with torch.no_grad():
            logits = one.model(input_ids=ids).logits[0, -1]
        scores = [float(logits[int(letter[1:])]) for letter in asked_one.letters]
        assert chosen == scores.index(max(scores))


def test_pasf_is_right_minus_the_mean_of_the_wrong_answers_over_all_questions() -> None:
    asked = questions(6, right=2)
    wanted = torch.zeros(LAYERS, HIDDEN)
    for one in asked:
        others = [at_letter(one, n) for n in range(len(one.letters)) if n != one.answer]
        wanted += (at_letter(one, one.answer) - torch.stack(others).mean(dim=0)) / len(asked)
    found = extract_with(loaded("llama"), behaviour(asked), method="pasf")
    assert torch.allclose(found.vectors, wanted, atol=1e-4)
    assert found.operation == "add"


def test_ipasa_is_its_own_answers_where_right_against_where_wrong() -> None:
    asked = questions(9, right=4)
    own = choose(loaded("llama"), asked)
    right = [at_letter(one, mine) for one, mine in zip(asked, own, strict=True) if mine == one.answer]
    wrong = [at_letter(one, mine) for one, mine in zip(asked, own, strict=True) if mine != one.answer]
    assert (len(right), len(wrong)) == (4, 5)
    found = extract_with(loaded("llama"), behaviour(asked), method="ipasa")
    assert torch.allclose(found.vectors, torch.stack(right).mean(0) - torch.stack(wrong).mean(0), atol=1e-4)


def test_ipaswo_is_the_right_against_its_own_answer_where_that_is_wrong() -> None:
    asked = questions(9, right=4)
    own = choose(loaded("llama"), asked)
    differences = [
        at_letter(one, one.answer) - at_letter(one, mine)
        for one, mine in zip(asked, own, strict=True)
        if mine != one.answer
    ]
    found = extract_with(loaded("llama"), behaviour(asked), method="ipaswo")
    assert torch.allclose(found.vectors, torch.stack(differences).mean(0), atol=1e-4)


def test_off_by_one_reads_the_block_s_input_and_steers_its_output() -> None:
    asked = questions(8, right=3)
    plain, shifted = (
        extract_with(loaded("llama"), behaviour(asked), method="pasf", off_by_one=arm) for arm in (False, True)
    )
    assert torch.allclose(shifted.vectors[1:], plain.vectors[:-1], atol=1e-5)
    assert shifted.point == "resid_post"
    assert shifted.program(2, 1.7, "last_prompt").interventions[0].site.point == "resid_post"


def test_a_clamp_sets_the_mean_projection_of_the_positive_side() -> None:
    asked = questions(7, right=3)
    found = extract_with(loaded("llama"), behaviour(asked), method="pasf", operation="clamp")
    positive = torch.stack([at_letter(one, one.answer) for one in asked]).mean(dim=0)
    one = found.program(1, 0.7, "last_prompt").interventions[0]
    assert one.operation == "clamp"
    assert one.projection == pytest.approx(float(positive[1] @ one.vector), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_labels_say_nothing(method: ChoiceMethod) -> None:
    """Where every item carries the same difference, what is left of it under shuffled labels is small."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
    items = []
    for n in range(40):
        noise = 0.3 * torch.randn(3, 2, HIDDEN, generator=generator)
        answer, own = n % 3, n % 3 if n % 2 else (n + 1 + n // 3 % 2) % 3
        noise[answer] += 2.5 * unit
        items.append(Item(noise, answer, own))
    found = with_controls(items, method, 7, seed=5)
    assert torch.nn.functional.cosine_similarity(found.vectors, unit.expand(2, -1)).min() > 0.95
    assert tuple(found.shuffled.shape) == (7, 2, HIDDEN)
    assert bool((found.shuffled.norm(dim=-1) < 0.6 * found.vectors.norm(dim=-1)).all())
    cosines = torch.nn.functional.cosine_similarity(found.shuffled, unit.expand(7, 2, -1), dim=-1)
    raw = [mean_sides(relabelled(items, method, generator), method) for _ in range(20)]
    sizes = torch.stack([(high - low) @ unit for high, low in raw]).abs().mean()
    assert float(sizes) < 0.35 * float(found.vectors[0] @ unit)
    assert float(cosines.max() - cosines.min()) > 0.05
    assert torch.equal(found.shuffled, with_controls(items, method, 7, seed=5).shuffled)
    assert not torch.equal(found.shuffled, with_controls(items, method, 7, seed=6).shuffled)


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
    found = extract_with(loaded("llama"), behaviour(questions(8, right=0)), method="ipaswo")
    assert float(found.vectors.norm(dim=-1).min()) > 0.01


def test_what_are_no_questions_is_refused() -> None:
    one = loaded("llama")
    same = [question(n, 1) for n in range(5)]
    with pytest.raises(RecipeError, match="the right answer is w41 in all 5 questions"):
        extract_with(one, behaviour(same), method="pasf")
    with pytest.raises(RecipeError, match=r"data\.train has none; give rows of question, choices"):
        extract_with(one, behaviour([]), method="pasf")
    with pytest.raises(RecipeError, match=r"extract\.pairs: found 12 questions in data\.train; needed: 30"):
        extract_with(one, behaviour(questions()), method="pasf", pairs=30)
    for letters in (("w30 w31", "w41"), ("nothing", "else")):  # two tokens; one and the same
        asked = [question(n, n % 2, letters) for n in range(4)]
        with pytest.raises(RecipeError, match="needs letters that are one token each"):
            extract_with(one, behaviour(asked), method="pasf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pasf", "readout": "last_prompt"}, "reads the letter that is the response"),
        ({"operation": "clamp", "length": "unit"}, "a clamp has no length"),
        ({"operation": "ablate", "length": "unit"}, "an ablation has no length"),
        ({"operation": "ablate", "method": "trained"}, "use operation add"),
        ({"operation": "ablate", "point": "mlp_out"}, "read the direction at point resid_post, not mlp_out"),
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
