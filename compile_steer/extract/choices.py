"""Directions from labelled multiple-choice questions, with no pairs written by hand (PAS, Cui & Chen 2509.22739).

Every question is read once with each of its letters as the answer, at that letter. The methods differ in which
of these count as positive and which as negative; the vectors are raw differences of means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Advance
from compile_steer.data.behaviour import Question
from compile_steer.extract.found import Found
from compile_steer.extract.options import ChoiceMethod
from compile_steer.models.forward import read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.scoring.answers import Request, answer
from compile_steer.steering.sites import Point

_LEAST = 2  # one item of a kind cannot be shuffled


@dataclass(frozen=True)
class Item:
    """One question: `activations` [k, L, d] of its k answers, which is right, and which the model chooses itself."""

    activations: Tensor
    right: int
    own: int


def choose(loaded: LoadedModel, questions: Sequence[Question]) -> list[int]:
    """The letter that the model finds likeliest for each question, as an index; raises `RecipeError` for bad letters."""
    asked = Request([question.prompt for question in questions], scored=False)
    by_prompt = {question.prompt: question for question in questions}
    (found,) = answer(loaded, [asked], lambda replies: np.zeros(len(replies)), 1, by_prompt)
    return [question.letters.index(letter) for question, letter in zip(questions, found.texts, strict=True)]


def read_items(loaded: LoadedModel, questions: Sequence[Question], point: Point, advance: Advance) -> list[Item]:
    """Every question with each answer; `advance` is called with the number of answers just read.

    Raises:
        RecipeError: letters that are no single tokens. LayoutError: NaN activations.
    """
    own = choose(loaded, questions)
    texts = [Text(question.prompt, letter) for question in questions for letter in question.letters]
    # The letter is the whole response, and the last token of the text.
    activations = read_activations(loaded, texts, point=point, readout="response_mean", advance=advance)
    parts = activations.split([len(question.letters) for question in questions])
    return [Item(part, question.answer, mine) for part, question, mine in zip(parts, questions, own, strict=True)]


def sides(items: Sequence[Item], method: ChoiceMethod) -> tuple[Tensor, Tensor]:
    """Mean activations [L, d] of the positive and of the negative side.

    pasf: all items, the right answer against the mean of the wrong ones. ipasa: the model's own answers, where they
    are right against where they are wrong (unpaired). ipaswo: items answered wrong, the right answer against its own.
    """
    wrong = [item for item in items if item.own != item.right]
    if method == "pasf":
        positive = [item.activations[item.right] for item in items]
        negative = [_others(item).mean(dim=0) for item in items]
    elif method == "ipasa":
        positive = [item.activations[item.own] for item in items if item.own == item.right]
        negative = [item.activations[item.own] for item in wrong]
    else:
        positive = [item.activations[item.right] for item in wrong]
        negative = [item.activations[item.own] for item in wrong]
    return torch.stack(positive).mean(dim=0), torch.stack(negative).mean(dim=0)


def _others(item: Item) -> Tensor:
    keep = torch.arange(len(item.activations)) != item.right
    return item.activations[keep]


def relabelled(items: Sequence[Item], method: ChoiceMethod, generator: torch.Generator) -> list[Item]:
    """The items with labels that say nothing, so balanced that what they have in common cancels.

    pasf: each answer of a question is the right one equally often. ipasa: which items count as right is permuted.
    ipaswo: in half of the wrong items right and own answer are swapped.
    """
    order = torch.randperm(len(items), generator=generator).tolist()
    if method == "pasf":
        turned = {row: at for at, row in enumerate(order)}
        return [replace(item, right=(item.right + turned[n]) % len(item.activations)) for n, item in enumerate(items)]
    if method == "ipasa":
        counts = [items[row].own == items[row].right for row in order]
        return [
            replace(item, right=item.own if right else (item.own + 1) % len(item.activations))
            for item, right in zip(items, counts, strict=True)
        ]
    wrong = [row for row in order if items[row].own != items[row].right]
    swap = set(wrong[: len(wrong) // 2])
    return [replace(item, right=item.own, own=item.right) if n in swap else item for n, item in enumerate(items)]


def fit(items: Sequence[Item], method: ChoiceMethod, count: int, seed: int) -> Found:
    """The direction at every block, and `count` that the method finds from labels that say nothing.

    Raises:
        RecipeError: the model gets too many or too few right for the method.
    """
    _require_both(items, method)
    generator = torch.Generator().manual_seed(seed)
    found = [sides(items, method)]
    found += [sides(relabelled(items, method, generator), method) for _ in range(count)]
    positive = torch.stack([high for high, _low in found])
    vectors = positive - torch.stack([low for _high, low in found])
    return Found(vectors[0], vectors[1:], positive)


def require_questions(questions: Sequence[Question], method: ChoiceMethod) -> None:
    """Raise `RecipeError` where there is nothing to tell right from wrong by, but a letter."""
    if not questions:
        raise RecipeError(
            f"extract.method {method} reads labelled questions, and data.train has none; give rows of question, choices "
            "and answer (data.kind: choices), or use method mean_difference."
        )
    ((letter, most),) = Counter(question.letters[question.answer] for question in questions).most_common(1)
    if most == len(questions):
        raise RecipeError(
            f"data.train: the right answer is {letter} in all {most} questions, so the direction would be that letter's. "
            "Put the right answer under each letter about equally often."
        )


def _require_both(items: Sequence[Item], method: ChoiceMethod) -> None:
    right = sum(item.own == item.right for item in items)
    wrong = len(items) - right
    if method == "ipaswo" and wrong < _LEAST:
        needed = f"at least {_LEAST} that it answers wrong"
    elif method == "ipasa" and min(right, wrong) < _LEAST:
        needed = f"at least {_LEAST} that it answers right and {_LEAST} that it answers wrong"
    else:
        return
    raise RecipeError(
        f"extract.method {method}: the model answers {right} of {len(items)} training questions right and {wrong} wrong; "
        f"needed: {needed}. Use method pasf, which needs no mistakes, or {'harder' if wrong < _LEAST else 'easier'} questions."
    )
