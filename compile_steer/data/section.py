"""The recipe's `data` section: what all kinds of rows have in common, which stand in `data.kinds`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from compile_steer.common.errors import RecipeError, several
from compile_steer.common.options import Section
from compile_steer.data.behaviour import SPLITS, Behaviour, normalized, repeated_prompts
from compile_steer.data.sources import MAX_LINES, Reader, Row, Source, text_of
from compile_steer.models.text import Pair

Rows = Mapping[str, Sequence[Row]]
# The keys that a row of these parts must have, and those that it may have.
_PROMPT = (("prompt",), ("history", "system"))
_TEXT_KEYS = {"neutral": (("prompt", "response"), _PROMPT[1]), "heldout": _PROMPT, "calibration": _PROMPT}
_PARTS = (*SPLITS, *_TEXT_KEYS)
TEXTS = Path(__file__).parent / "texts"  # general texts and prompts, for a behaviour that brings none of its own


class GenerateOptions(Section):
    """How the model generates both sides of its pairs, and how many pairs are needed."""

    max_new_tokens: int = Field(
        48, ge=4, le=100_000, description="a longer response is cut after its last whole sentence"
    )
    tries: int = Field(1, ge=1, description="attempts at a response: the first greedy, the others sampled")
    temperature: float = Field(0.7, gt=0, description="of the sampled attempts")
    max_repetition: float = Field(0.2, gt=0, lt=1, description="largest fraction of repeated 3-grams")
    min_pairs: int = Field(16, ge=4, description="number of pairs that every split must have in the end")


class DataSection(Section, ABC):
    """The recipe's `data`: a JSONL file beside the recipe, or a data set, for each of six parts.

    Each split has its own source, whatever the kind. The splits of one data set are parts of it: `split: 'train[:60%]'`.
    """

    keys: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    rearranged: ClassVar[str] = ""  # what `arranged` does to rows that it changes

    train: Source = Field(description="rows that the direction is found from")
    validation: Source = Field(description="rows that layer and coefficient are chosen on")
    test: Source = Field(description="rows that the chosen program is measured on, once")
    neutral: Source | None = Field(
        None, description="control texts (prompt, response); by default those of the package"
    )
    heldout: Source | None = Field(None, description="prompts for verification alone; by default those of the package")
    calibration: Source | None = Field(
        None, description="prompts whose steered continuations a compile is fitted to; by default those of the package"
    )

    @property
    def generation(self) -> GenerateOptions | None:
        """How the model generates the responses; None where the rows have them."""
        return getattr(self, "generate", None)

    def read(self, folder: Path) -> Behaviour:
        """Read and check all data, with paths relative to `folder`; raises one `RecipeError` with every problem.

        Responses that the model is to generate are empty.
        """
        reader = Reader(folder)
        rows = {name: reader.rows(*self._row_args(name)) for name in _PARTS}
        splits = {name: self.arranged(rows[name]) for name in SPLITS}
        prompts = {name: [self.subject(row) for row in part] for name, part in splits.items()}
        # Of the package's own texts those are left out whose prompt the recipe's data have.
        named = [
            *prompts.values(),
            *([row["prompt"] for row in rows[name]] for name in _TEXT_KEYS if getattr(self, name)),
        ]
        taken = {normalized(prompt) for part in named for prompt in part}
        for name in _TEXT_KEYS:
            if getattr(self, name) is None:
                rows[name] = [row for row in rows[name] if normalized(row["prompt"]) not in taken]
        texts = {name: rows[name] for name in _TEXT_KEYS}
        prompts |= {name: [row["prompt"] for row in part] for name, part in texts.items()}
        places = {name: [row.place for row in part] for name, part in rows.items()}
        repeated, unusable = list(repeated_prompts(prompts, places)), list(self.problems(splits))
        if problems := [*reader.problems, *several(repeated, MAX_LINES), *several(unusable, MAX_LINES)]:
            raise RecipeError(problems)
        parts: dict[str, Any] = {name: tuple(map(self.pair, part)) for name, part in splits.items()}
        parts |= {name: tuple(map(text_of, part)) for name, part in texts.items()}
        notes = tuple(f"data.{name}: {self.rearranged}" for name in SPLITS if splits[name] is not rows[name])
        return Behaviour(**parts, hashes=reader.hashes, places=places, notes=notes, **self.labels(splits))

    @property
    def files(self) -> dict[str, Path]:
        """The sources that are files, by part, relative to the recipe."""
        return {name: source for name in _PARTS if isinstance(source := getattr(self, name), Path)}

    def hashes(self, folder: Path) -> tuple[dict[str, str], list[str]]:
        """Return the SHA-256 of the rows of each file that exists, as `read` records them, and the rows' problems."""
        reader = Reader(folder)
        for name, source, *keys in map(self._row_args, _PARTS):
            if isinstance(source, Path) and (folder / source).is_file():
                reader.rows(name, source, *keys)
        return reader.hashes, reader.problems

    def _row_args(self, name: str) -> tuple[str, Source, tuple[str, ...], tuple[str, ...]]:
        """The arguments of `Reader.rows` for a part."""
        source: Source | None = getattr(self, name)
        return name, source or TEXTS / f"{name}.jsonl", *_TEXT_KEYS.get(name, (self.keys, self.optional))

    def arranged(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows of a split as they are used."""
        return rows

    def subject(self, row: Row) -> str:
        """Return what must differ between any two rows."""
        return str(row["prompt"])

    def problems(self, rows: Rows) -> Iterator[str]:  # noqa: ARG002  (most kinds have some)
        """Yield a line for everything in the splits' rows that this kind cannot use."""
        yield from ()

    @abstractmethod
    def pair(self, row: Row) -> Pair: ...

    def labels(self, rows: Rows) -> dict[str, Any]:  # noqa: ARG002  (most kinds have none)
        """Return what `Behaviour` holds of the prompts besides the pairs: its `questions`, or its `checks`."""
        return {}
