"""What every kind of data becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Question:
    """A multiple-choice item: the user's whole prompt, choices included; the letters to choose from; which is right."""

    prompt: str
    letters: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Check:
    """One of IFEval's verifiable constraints by its id ("punctuation:no_comma"), and its arguments."""

    id: str
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Behaviour:
    """All data of one behaviour. The splits share no prompt, checked when read.

    `neutral` texts measure drift and perplexity, `heldout` prompts (other topics) are for verification
    alone, `calibration` prompts are what the compiler may see besides the training pairs. By plain prompt:
    `questions` where the data are multiple choice, `checks` where they name what an answer must satisfy.
    `mismatched` are another behaviour's pairs, where the recipe of a run names them for its controls.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    neutral: tuple[Text, ...]
    heldout: tuple[Text, ...]
    calibration: tuple[Text, ...]
    hashes: dict[str, str]
    questions: Mapping[str, Question] = field(default_factory=dict)
    checks: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)
    mismatched: tuple[Pair, ...] = ()

    def split(self, name: str) -> tuple[Pair, ...]:
        """The pairs of a split by its name."""
        pairs: tuple[Pair, ...] = getattr(self, name)
        return pairs


def asked_key(split: str) -> str:
    """Where `Behaviour.hashes` keeps what a split asks, when the model wrote its responses: `split` is then both."""
    return f"{split}, asked"


def require_distinct(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour) -> None:
    """Raise `RecipeError` where both sides of a pair are the same tokens, prompt and response: nothing tells them apart.

    What a tokenizer drops (case, accents, spaces: it depends) cannot be seen in the text.
    """
    problems = []
    for name in SPLITS:
        pairs = behaviour.split(name)
        same = [p for p in pairs if encode(tokenizer, p.positive) == encode(tokenizer, p.negative)]
        if same:
            problems.append(
                f"data.{name}: the two sides of {len(same)} of {len(pairs)} pairs are the same tokens for this model, "
                f"as '{same[0].positive.response}' and '{same[0].negative.response}' (prompt '{same[0].prompt}'). Remove "
                "them, or make the sides differ in more than what the tokenizer drops."
            )
    if problems:
        raise RecipeError(problems)


@dataclass(frozen=True)
class Context:
    """What every stage is given beside the value before it and its own options."""

    model: LoadedModel
    data: Behaviour
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
