"""All data of one behaviour, whatever it was read from, and the context that every stage receives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compile_steer.common.errors import RecipeError, brief
from compile_steer.common.progress import Progress
from compile_steer.models.text import Pair, Text

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from compile_steer.models.load import LoadedModel

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    prompt: str  # the whole user prompt, choices included
    letters: tuple[str, ...]
    answer: int  # index of the right letter


@dataclass(frozen=True)
class Check:
    """One of IFEval's verifiable constraints: its id ("punctuation:no_comma") and its arguments."""

    id: str
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, repr=False)
class Behaviour:
    """All data of one behaviour. No prompt is in two of the six parts.

    Attributes:
        train, validation, test: contrast pairs. A pair whose responses the model has yet to generate has empty ones.
        neutral: control texts, which measure the KL from the base and the perplexity.
        heldout: prompts on other topics, for verification alone.
        calibration: prompts that the compiler may see besides the training pairs.
        hashes: SHA-256 of the rows that each part was read from.
        questions: by prompt, where the data are multiple choice.
        checks: by prompt, the constraints that a response must satisfy.
        other_behaviour: another behaviour's pairs, for a control of the validation.
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
    other_behaviour: tuple[Pair, ...] = ()

    def __repr__(self) -> str:
        parts = (*SPLITS, "neutral", "heldout", "calibration")
        return f"Behaviour({', '.join(f'{len(getattr(self, name))} {name}' for name in parts)})"

    def split(self, name: str) -> tuple[Pair, ...]:
        """Return the pairs of a split by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class Context:
    """What every stage receives besides the value before it and its own options."""

    model: LoadedModel
    data: Behaviour
    seed: int = 0
    progress: Progress = field(default_factory=Progress)


def prompts_key(split: str) -> str:
    """Return the key of `Behaviour.hashes` for the prompts of a split whose responses the model generated."""
    return f"{split}, prompts"


def normalized(text: str) -> str:
    """Return a text without its case and spacing, to find it again."""
    # A model reads "What is rain?" and "what is  rain?" alike, so one in each split would be a leak.
    return " ".join(text.casefold().split())


def repeated_prompts(prompts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a line for each prompt that occurs twice, within a part of the data or in two parts."""
    first: dict[str, str] = {}
    for name, part in prompts.items():
        for prompt in part:
            other = first.setdefault(normalized(prompt), name)
            if other != name:
                yield f"data: the prompt {brief(prompt)} is in both {other} and {name}; the splits must not overlap."
        for key, count in sorted(Counter(map(normalized, part)).items()):
            if count > 1:
                yield f"data.{name}: the prompt {brief(key)} occurs {count} times."


def require_distinct(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour) -> None:
    """Raise `RecipeError` if both sides of a pair are the same tokens: some tokenizers drop case, accents or spaces."""
    from compile_steer.models.tokens import encode  # torch: a recipe is read without it

    problems = []
    for name in SPLITS:
        pairs = behaviour.split(name)
        same = [p for p in pairs if encode(tokenizer, p.positive) == encode(tokenizer, p.negative)]
        if same:
            problems.append(
                f"data.{name}: the two sides of {len(same)} of {len(pairs)} pairs are the same tokens for this model, "
                f"for example {brief(same[0].positive.response)} and {brief(same[0].negative.response)} (prompt "
                f"{brief(same[0].prompt)}). Remove them, or make the sides differ in more than the tokenizer drops."
            )
    if problems:
        raise RecipeError(problems)
