"""What all kinds of data have in common: their sources, and that no split may see another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from compile_steer.common.errors import RecipeError
from compile_steer.common.options import Section
from compile_steer.data.behaviour import SPLITS, Behaviour, Check, Question
from compile_steer.data.sources import Reader, Row, Source
from compile_steer.models.text import Pair, Text

Rows = Mapping[str, Sequence[Row]]
_PROMPTS = ("heldout", "calibration")
_SOURCES = (*SPLITS, "neutral", *_PROMPTS)


class Write(Section):
    """How the model writes both sides of its pairs, and how many must come of it."""

    max_new_tokens: int = Field(48, ge=4, description="an answer that is longer is cut after its last whole sentence")
    tries: int = Field(1, ge=1, description="answers a side may take: the first greedy, further ones sampled")
    temperature: float = Field(0.7, gt=0, description="of the sampled ones")
    max_repetition: float = Field(0.2, gt=0, lt=1, description="share of repeated 3-grams")
    min_pairs: int = Field(16, ge=4, description="how many pairs every split must have in the end")


class DataSection(Section, ABC):
    """The recipe's `data`: a JSONL file beside the recipe, or a data set, for each of six purposes.

    The splits are named apart, whatever the kind; of one data set they are parts: `split: 'train[:60%]'`.
    """

    keys: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()

    train: Source
    validation: Source
    test: Source
    neutral: Source
    heldout: Source
    calibration: Source

    @property
    def writing(self) -> Write | None:
        """How the responses are written, where the rows have none."""
        return None

    def read(self, folder: Path) -> Behaviour:
        """Read and check all data of a behaviour; raises one `RecipeError` with every problem.

        Where the model is to write the responses they are empty.
        """
        reader = Reader(folder)
        found = {name: reader.rows(name, getattr(self, name), *self._keys(name)) for name in _SOURCES}
        rows, neutral = {name: found[name] for name in SPLITS}, found["neutral"]
        others = {name: found[name] for name in _PROMPTS}
        asked = {name: [self.subject(row) for row in some] for name, some in rows.items()}
        plain = {name: [row["prompt"] for row in found[name]] for name in ("neutral", *_PROMPTS)}
        problems = [*reader.problems, *_repeats({**asked, **plain}), *self.problems(rows)]
        if problems:
            raise RecipeError(problems)
        train, validation, test = (tuple(self.pair(row) for row in rows[name]) for name in SPLITS)
        return Behaviour(
            train,
            validation,
            test,
            tuple(map(_text, neutral)),
            tuple(map(_text, others["heldout"])),
            tuple(map(_text, others["calibration"])),
            reader.hashes,
            self.questions(rows),
            self.checks(rows),
        )

    @property
    def files(self) -> dict[str, Path]:
        """The sources that are files, by purpose, relative to the recipe."""
        sources = {name: getattr(self, name) for name in _SOURCES}
        return {name: source for name, source in sources.items() if isinstance(source, Path)}

    def hashes(self, folder: Path) -> tuple[dict[str, str], list[str]]:
        """SHA-256 of the rows of each file that is there, as `read` records them, and what is wrong with the rows."""
        reader = Reader(folder)
        for name, source in self.files.items():
            if (folder / source).is_file():
                reader.rows(name, source, *self._keys(name))
        return reader.hashes, reader.problems

    def _keys(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys that a row of a source must have, and those that it may."""
        if name in SPLITS:
            return self.keys, self.optional
        return ("prompt", "response") if name == "neutral" else ("prompt",), ("history",)

    def subject(self, row: Row) -> str:
        """What no other row may ask."""
        return str(row["prompt"])

    @abstractmethod
    def problems(self, rows: Rows) -> Iterator[str]:
        """A line for everything about the splits' rows that this kind cannot use."""

    @abstractmethod
    def pair(self, row: Row) -> Pair: ...

    def questions(self, rows: Rows) -> Mapping[str, Question]:  # noqa: ARG002  (most kinds have none)
        return {}

    def checks(self, rows: Rows) -> Mapping[str, tuple[Check, ...]]:  # noqa: ARG002
        return {}


def template_problems(key: str, template: str, *places: str) -> Iterator[str]:
    """A line if a template lacks one of `places`, or has it twice."""
    for place in places:
        if template.count(place) != 1:
            yield f"data.{key} '{template}' must contain {place} exactly once."


def fill(template: str, **values: str) -> str:
    """A template with its places taken at once, so that braces in a value are text."""
    before, *rest = template.split("{")
    parts = [before]
    for part in rest:
        name, brace, after = part.partition("}")
        parts.append(values[name] + after if brace and name in values else "{" + part)
    return "".join(parts)


def folded(text: str) -> str:
    """A text without its case and spacing, to find it again."""
    return " ".join(text.casefold().split())


def _text(row: Row) -> Text:
    history = tuple((user, assistant) for user, assistant in row.get("history", []))
    return Text(row["prompt"], row.get("response", ""), history)


def _repeats(prompts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A line for each prompt that stands twice, within a source or across sources."""
    seen: dict[str, str] = {}
    for name, found in prompts.items():
        for prompt in found:
            before = seen.setdefault(folded(prompt), name)
            if before != name:
                yield f"data: the prompt '{prompt}' is in both {before} and {name}; the splits must not overlap."
        keys = [folded(prompt) for prompt in found]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            yield f"data.{name}: the prompt '{key}' stands {keys.count(key)} times."
