"""Contrast pairs in memory: the data of a behaviour for those who work in Python, without a recipe."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError, brief, several
from compile_steer.common.reading import read_json_lines
from compile_steer.data.behaviour import SPLITS, Behaviour, normalized, repeated_prompts
from compile_steer.data.section import TEXTS
from compile_steer.data.shapes import PAIR, known_shape
from compile_steer.data.sources import MAX_LINES, Reader, Row, checked_row, text_of
from compile_steer.models.text import Pair, Text

Located = tuple[str, Any]  # where a row was found ("row 3", "pairs.jsonl:4"), and the row


@dataclass(frozen=True, repr=False)
class Pairs(Sequence[Pair]):
    """Contrast pairs: for each prompt a response that shows the behaviour and one that does not.

    Make them with `from_list`, `from_file` or `from_dataset`. Rows may have the keys prompt, positive and negative, or a
    shape that other tools use: chosen and rejected, lists of chat messages, questions of contrastive activation addition.
    These raise one `RecipeError` with the problems of all
    rows: fields that are missing or no text, prompts that occur twice (whatever their case and spacing), and pairs
    whose two sides are the same.

    Example:
        >>> pairs = Pairs.from_list([("Who are you?", "Arr, a pirate!", "I am an assistant."), ...])
        >>> train, validation, test = pairs.split(seed=1)
        >>> data = pairs.to_behaviour(neutral=["A text on another topic.", ...], heldout=["What is rain?", ...])
    """

    pairs: tuple[Pair, ...]

    @staticmethod
    def from_list(rows: Iterable[Pair | Mapping[str, str] | Sequence[str]]) -> Pairs:
        """Make pairs of (prompt, positive, negative) tuples, of dicts, or of `Pair` values."""
        return checked_pairs([(f"row {n}", row) for n, row in enumerate(rows)], [])

    @staticmethod
    def from_file(path: str | Path) -> Pairs:
        """Read a .jsonl, .json, .csv or .parquet file of rows with prompt, positive and negative, or of a known shape."""
        reader, bad = Reader(Path(), section=""), list[str]()
        located = list(reader.located("pairs", Path(path), PAIR, (), bad))
        return checked_pairs(located, [*reader.problems, *bad])

    @staticmethod
    def from_dataset(
        dataset: Iterable[Mapping[str, Any]],
        *,
        prompt: str = "prompt",
        positive: str = "positive",
        negative: str = "negative",
    ) -> Pairs:
        """Make pairs of the named columns of a `datasets.Dataset`, or of anything that yields a mapping for each row."""
        columns = dict(zip(PAIR, (prompt, positive, negative), strict=True))
        located, problems = list[Located](), list[str]()
        for n, row in enumerate(dataset):
            if shape := known_shape(row, tuple(columns.values())):
                located.append((f"row {n}", {key: row[key] for key in shape}))
            elif set(columns.values()) <= set(row):
                located.append((f"row {n}", {key: row[column] for key, column in columns.items()}))
            else:
                problems.append(f"row {n}: found the columns {sorted(row)}; needed {', '.join(columns.values())}.")
        return checked_pairs(located, problems)

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        return Pairs(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __repr__(self) -> str:
        if not self.pairs:
            return "Pairs(n=0)"
        first = self.pairs[0]
        prompt, *sides = (_short(text) for text in (first.prompt, first.positive.response, first.negative.response))
        return f"Pairs(n={len(self)}, first: {prompt!r} -> {sides[0]!r} / {sides[1]!r})"

    def split(
        self, train: float = 0.6, validation: float = 0.2, test: float = 0.2, seed: int = 0
    ) -> tuple[Pairs, Pairs, Pairs]:
        """Divide the pairs at random into three parts by their fractions, which add up to 1; the parts share no prompt.

        Raises `RecipeError` for other fractions, or a part without a pair.
        """
        fractions = (train, validation, test)
        if not (min(fractions) > 0 and abs(sum(fractions) - 1) <= 1e-6):  # NaN is neither
            raise RecipeError(f"Pairs.split: found the fractions {fractions}; needed: all above 0, with the sum 1.")
        n, order = len(self), random.Random(seed).sample(range(len(self)), len(self))
        first, second = round(train * n), round((train + validation) * n)
        # Sorted, so that the pairs of a part keep the order that they have in their file.
        rows = [sorted(part) for part in (order[:first], order[first:second], order[second:])]
        if not all(rows):
            sizes = ", ".join(f"{len(part)} for {name}" for name, part in zip(SPLITS, rows, strict=True))
            raise RecipeError(f"Pairs.split: {n} pairs give {sizes}; needed: 1 or more for each. Add pairs.")
        parts = [Pairs(tuple(self.pairs[row] for row in part)) for part in rows]
        return parts[0], parts[1], parts[2]

    def to_behaviour(
        self,
        *,
        neutral: Sequence[str | Text] | None = None,
        heldout: Sequence[str | Text] | None = None,
        calibration: Sequence[str | Text] | None = None,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        seed: int = 0,
    ) -> Behaviour:
        """Return all the data that the stages need, from these pairs and from texts on other topics.

        A part that is not given is taken from the general texts that the package brings, without those whose prompt a
        pair has.

        Args:
            neutral: control texts, which measure the KL from the base and the perplexity. A plain string is divided
                in the middle: its first words are the prompt, the others the response.
            heldout: prompts that only the verification sees.
            calibration: prompts that the compiler may see besides the training pairs.
            fractions: of training, validation and test pairs.

        Raises `RecipeError` for a prompt that occurs twice, an unusable text, or too few pairs.
        """
        sources = {"neutral": neutral, "heldout": heldout, "calibration": calibration}
        problems: list[str] = []
        parts = {name: _texts(name, texts, problems) for name, texts in sources.items() if texts is not None}
        prompts = {"pairs": [pair.prompt for pair in self]}
        prompts |= {name: [text.prompt for text in parts.get(name, ())] for name in sources}
        taken = {normalized(prompt) for part in prompts.values() for prompt in part}
        for name in sources.keys() - parts.keys():
            texts = [text_of(row) for _line, row in read_json_lines(TEXTS / f"{name}.jsonl")]
            parts[name] = tuple(text for text in texts if normalized(text.prompt) not in taken)
            prompts[name] = [text.prompt for text in parts[name]]
        problems += repeated_prompts(prompts)
        if problems:
            raise RecipeError(problems)
        splits = dict(zip(SPLITS, self.split(*fractions, seed), strict=True))
        values: dict[str, Any] = {**{name: split.pairs for name, split in splits.items()}, **parts}
        return Behaviour(**values, hashes={name: digest([asdict(v) for v in part]) for name, part in values.items()})


def read_pairs(key: str, path: Path) -> dict[str, Pair]:
    """Return pairs that are no split of the recipe's data by their places ("x.jsonl:2"); raises `RecipeError`.

    Args:
        key: the recipe's, which names the file in the error.
    """
    reader = Reader(path.parent, section="")
    rows = reader.rows(key, Path(path.name), PAIR)
    if reader.problems:
        raise RecipeError(reader.problems)
    return {row.place: _pair(row) for row in rows}


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Return the hash of another behaviour's pairs, empty where there are none."""
    return digest([asdict(pair) for pair in pairs]) if pairs else ""


def _pair(row: Row) -> Pair:
    return Pair(Text(row["prompt"], row["positive"]), Text(row["prompt"], row["negative"]), row["prompt"])


def checked_pairs(located: Iterable[Located], problems: Sequence[str]) -> Pairs:
    """Return the pairs of the rows, each with its place; raises `RecipeError` with `problems` and all others."""
    problems = list(problems)
    pairs: list[Pair] = []
    first: dict[str, str] = {}
    for where, row in located:
        if isinstance(row, tuple | list) and len(row) == len(PAIR):
            row = dict(zip(PAIR, row, strict=True))
        if not isinstance(row, Pair):
            checked = checked_row(where, row, PAIR, (), problems)
            if checked is None:
                continue
            row = _pair(checked)
        other = first.setdefault(normalized(row.prompt), where)
        if other != where:
            problems.append(f"{where}: the prompt {brief(row.prompt)} is in {other} too.")
        sides = [replace(text, response=text.response.strip()) for text in (row.positive, row.negative)]
        if sides[0] == sides[1]:
            problems.append(f"{where}: positive and negative are the same text, {brief(row.positive.response)}.")
        pairs.append(row)
    if not pairs and not problems:
        problems = ["found 0 pairs; needed: 1 or more."]
    if problems:
        raise RecipeError(several(problems, MAX_LINES))
    return Pairs(tuple(pairs))


def _texts(name: str, texts: Sequence[str | Text], problems: list[str]) -> tuple[Text, ...]:
    """Return a part's texts, and add a line to `problems` for each that cannot be used."""
    parsed: list[Text] = []
    for n, text in enumerate(texts):
        if isinstance(text, str):
            words = text.split(" ")
            middle = len(words) // 2 if name == "neutral" else len(words)
            text = Text(" ".join(words[:middle]), " ".join(words[middle:]))
        if not text.prompt.strip() or (name == "neutral" and not text.response.strip()):
            needed = "a prompt and a response; of a plain string, two words" if name == "neutral" else "a prompt"
            problems.append(f"{name}, text {n}: found {brief(text.prompt + text.response)}; needed: {needed}.")
        else:
            parsed.append(text)
    if not texts:
        problems.append(f"{name}: found 0 texts; needed: 1 or more, or leave it out to take the package's own.")
    return tuple(parsed)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
