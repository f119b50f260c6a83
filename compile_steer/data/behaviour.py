"""All data of one behaviour, whatever it was read from, and the context that every stage receives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compile_steer.common.errors import brief
from compile_steer.common.progress import Progress
from compile_steer.models.text import Pair, Text

if TYPE_CHECKING:
    from compile_steer.models.load import LoadedModel

SPLITS = ("train", "validation", "test")
SIDES = ("positive", "negative")  # of a pair, and the keys of its responses in a row


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
        places: where the rows of each part were read ("train.jsonl:2"), in their order; of what was not read none.
        notes: what was done to the rows that their reader should know.
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
    places: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

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


def repeated_prompts(
    prompts: Mapping[str, Sequence[str]], places: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Iterator[str]:
    """Yield a line for each prompt that occurs twice, within a part of the data or in two parts, with its places."""
    yield from shared_texts("prompt", prompts, places)
    for name, part in prompts.items():
        occurrences: dict[str, list[str]] = {}
        for prompt, place in zip(part, places.get(name, [""] * len(part)), strict=True):
            occurrences.setdefault(normalized(prompt), []).append(place)
        for key, within in sorted(occurrences.items()):
            if len(within) > 1:
                yield f"data.{name}: the prompt {brief(key)} occurs {len(within)} times{_listed(within)}."


def shared_texts(
    kind: str, texts: Mapping[str, Sequence[str]], places: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Iterator[str]:
    """Yield a line for each text that is in two parts of the data; `kind` is what the texts are."""
    first: dict[str, tuple[str, str]] = {}
    for name, part in texts.items():
        distinct = {
            normalized(text): (text, place)
            for text, place in zip(part, places.get(name, [""] * len(part)), strict=True)
        }
        for key, (text, place) in distinct.items():
            other, earlier = first.setdefault(key, (name, place))
            if other != name:
                both = f"in both {other} and {name}{_listed((earlier, place))}"
                letter = " Answers to multiple choice are read by data.kind: choices." * (
                    kind == "response" and len(key) < 9
                )
                yield f"data: the {kind} {brief(text)} is {both}; the splits must not overlap.{letter}"


def _listed(places: Sequence[str]) -> str:
    return f" ({', '.join(places[:3])}{', ...' * (len(places) > 3)})" if places[0] else ""
