"""All data of one behaviour, whatever it was read from, and the context that every stage receives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compile_steer.common.errors import brief
from compile_steer.common.progress import Progress
from compile_steer.models.text import Pair, Text

if TYPE_CHECKING:
    from compile_steer.models.load import LoadedModel

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    prompt: str  # the whole user prompt, choices included
    letters: tuple[str, ...]
    answer: int  # index of the right letter
    choices: tuple[str, ...] = ()  # what the letters stand for, where it is known


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
    """What every stage receives besides the value before it and its own options.

    `notes` are what `check_texts` found; whoever reads a report should know it.
    """

    model: LoadedModel
    data: Behaviour
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    notes: tuple[str, ...] = ()


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
