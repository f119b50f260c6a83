"""Directions from labelled multiple-choice questions, with no pairs written by hand (PAS, Cui & Chen 2509.22739).

The model reads every question once with each of its letters as the answer, and the activation at that letter counts.
The methods differ in which of these are positive and which are negative; the directions are raw differences of means.
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
from compile_steer.data.behaviour import Context, Question
from compile_steer.extraction.options import ChoiceMethod, ExtractOptions
from compile_steer.extraction.pair_methods import ExtractedDirections
from compile_steer.models.forward import read_activations
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.scoring.answers import Request, answer
from compile_steer.steering.sites import Point

_MIN_ITEMS = 2  # one item of a kind cannot be shuffled


@dataclass(frozen=True)
class Item:
    """A question that was read."""

    activations: Tensor  # of its k answers, [k, L, d]
    right: int  # index of the right answer
    own: int  # index of the answer that the model chooses


def from_choices(context: Context, options: ExtractOptions, method: ChoiceMethod) -> ExtractedDirections:
    """Read all training questions, and find the direction of every block with its controls.

    Raises `RecipeError` for no or too few questions, the same letter right in all, letters that are more than one token,
    or a model that answers too many or too few right for the method.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in context.data.train))
    questions = [context.data.questions[prompt] for prompt in prompts if prompt in context.data.questions]
    questions = list(options.first(questions, "questions"))
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
    total = sum(len(question.letters) for question in questions)
    with context.progress.phase("reading activations of all answers", total) as advance:
        items = read_items(context.model, questions, options.read_point, advance)
    return with_controls(items, method, options.shuffled, context.seed)


def read_items(loaded: LoadedModel, questions: Sequence[Question], point: Point, advance: Advance) -> list[Item]:
    """Read every question with each of its answers; `advance` is called with the number of answers just read."""
    own = choose(loaded, questions)
    texts = [Text(question.prompt, letter) for question in questions for letter in question.letters]
    # The letter is the whole response, so its mean is the activation at the letter.
    activations = read_activations(loaded, texts, point=point, readout="response_mean", advance=advance)
    parts = activations.split([len(question.letters) for question in questions])
    return [Item(part, question.answer, index) for part, question, index in zip(parts, questions, own, strict=True)]


def choose(loaded: LoadedModel, questions: Sequence[Question]) -> list[int]:
    """Return the index of the letter that the model finds most likely, for each question."""
    request = Request([question.prompt for question in questions], scored=False)
    by_prompt = {question.prompt: question for question in questions}
    (answers,) = answer(loaded, [request], lambda replies: np.zeros(len(replies)), 1, by_prompt)
    return [question.letters.index(letter) for question, letter in zip(questions, answers.texts, strict=True)]


def mean_sides(items: Sequence[Item], method: ChoiceMethod) -> tuple[Tensor, Tensor]:
    """Return the mean activations [L, d] of the positive and of the negative side.

    pasf: of all items, the right answer and the mean of the wrong ones. ipasa: the model's own answers, those that are
    right and those that are wrong (unpaired). ipaswo: of the items answered wrong, the right answer and its own.
    """
    wrong = [item for item in items if item.own != item.right]
    positive_items = {"pasf": items, "ipasa": [item for item in items if item.own == item.right], "ipaswo": wrong}[
        method
    ]
    positive = [item.activations[item.right] for item in positive_items]
    negative = [item.activations[item.own] for item in wrong]
    if method == "pasf":
        negative = [item.activations[torch.arange(len(item.activations)) != item.right].mean(dim=0) for item in items]
    return torch.stack(positive).mean(dim=0), torch.stack(negative).mean(dim=0)


def relabelled(items: Sequence[Item], method: ChoiceMethod, generator: torch.Generator) -> list[Item]:
    """Return the items with labels that carry no information, balanced so that what the items share cancels."""
    order = torch.randperm(len(items), generator=generator).tolist()
    if method == "pasf":  # each answer of a question is the right one equally often
        shift = {row: at for at, row in enumerate(order)}
        return [replace(item, right=(item.right + shift[n]) % len(item.activations)) for n, item in enumerate(items)]
    if method == "ipasa":  # which items count as right is permuted
        is_right = [items[row].own == items[row].right for row in order]
        return [
            replace(item, right=item.own if right else (item.own + 1) % len(item.activations))
            for item, right in zip(items, is_right, strict=True)
        ]
    # ipaswo: in half of the items answered wrong, the right and the own answer are swapped.
    wrong = [row for row in order if items[row].own != items[row].right]
    swap = set(wrong[: len(wrong) // 2])
    return [replace(item, right=item.own, own=item.right) if n in swap else item for n, item in enumerate(items)]


def with_controls(items: Sequence[Item], method: ChoiceMethod, n_controls: int, seed: int) -> ExtractedDirections:
    """Find the direction of every block, and what the method finds with labels that carry no information.

    Raises `RecipeError` if the model answers too many or too few right for the method.
    """
    right = sum(item.own == item.right for item in items)
    wrong = len(items) - right
    available = {"ipasa": {"right": right, "wrong": wrong}, "ipaswo": {"wrong": wrong}}.get(method, {})
    if any(number < _MIN_ITEMS for number in available.values()):
        needed = " and ".join(f"{_MIN_ITEMS} that it answers {answer}" for answer in available)
        raise RecipeError(
            f"extract.method {method}: the model answers {right} of {len(items)} training questions right and {wrong} "
            f"wrong; needed: at least {needed}. Use method pasf, which needs no mistakes, or "
            f"{'harder' if wrong < _MIN_ITEMS else 'easier'} questions."
        )
    generator = torch.Generator().manual_seed(seed)
    sides = [mean_sides(items, method)]
    sides += [mean_sides(relabelled(items, method, generator), method) for _ in range(n_controls)]
    positive = torch.stack([high for high, _low in sides])
    vectors = positive - torch.stack([low for _high, low in sides])
    return ExtractedDirections(vectors[0], vectors[1:], positive)
