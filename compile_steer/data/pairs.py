"""Contrast pairs in memory: the data of a behaviour for those who work in Python, without a recipe."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS, Behaviour, normalized, repeated_prompts
from compile_steer.data.sources import MAX_LINES, Reader, Row, checked_row
from compile_steer.models.text import Pair, Text

KEYS = ("prompt", "positive", "negative")
Located = tuple[str, Any]  # where a row was found ("row 3", "pairs.jsonl:4"), and the row


@dataclass(frozen=True, repr=False)
class Pairs(Sequence[Pair]):
    """Contrast pairs: for each prompt a response that shows the behaviour and one that does not.

    Make them with `from_list`, `from_jsonl` or `from_dataset`, which refuse a prompt that occurs twice (whatever its
    case and spacing) and a pair whose two sides are the same. Rows are counted from 0.

    Example:
        >>> pairs = Pairs.from_list([("Who are you?", "Arr, a pirate!", "I am an assistant."), ...])
        >>> train, validation, test = pairs.split(seed=1)
        >>> data = pairs.to_behaviour(neutral=["A text on another topic.", ...], heldout=["What is rain?", ...])
    """

    pairs: tuple[Pair, ...]

    @staticmethod
    def from_list(rows: Iterable[Pair | Mapping[str, str] | Sequence[str]]) -> Pairs:
        """Make pairs of (prompt, positive, negative) tuples, of dicts with these keys, or of `Pair` values.

        Raises:
            RecipeError: with every problem of every row.
        """
        return _checked([(f"row {n}", row) for n, row in enumerate(rows)], [])

    @staticmethod
    def from_jsonl(path: str | Path) -> Pairs:
        """Read a JSONL file of objects with the keys prompt, positive and negative.

        Raises:
            RecipeError: with every problem of every line.
        """
        path, bad = Path(path), list[str]()
        reader = Reader(path.parent, section="")
        located = reader.lines("pairs", path, KEYS, bad)
        return _checked(located, [*reader.problems, *bad])

    @staticmethod
    def from_dataset(
        dataset: Iterable[Mapping[str, Any]],
        *,
        prompt: str = "prompt",
        positive: str = "positive",
        negative: str = "negative",
    ) -> Pairs:
        """Make pairs of the rows of a table, for example of a `datasets.Dataset`.

        Args:
            dataset: anything that yields mappings from column to value.
            prompt, positive, negative: the columns to read; all others are ignored.

        Raises:
            RecipeError: with every problem of every row, missing columns included.
        """
        columns = dict(zip(KEYS, (prompt, positive, negative), strict=True))
        located, problems = list[Located](), list[str]()
        for n, row in enumerate(dataset):
            if set(columns.values()) <= set(row):
                located.append((f"row {n}", {key: row[column] for key, column in columns.items()}))
            else:
                problems.append(f"row {n}: found the columns {sorted(row)}; needed {', '.join(columns.values())}.")
        return _checked(located, problems)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        return Pairs(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __repr__(self) -> str:
        shown = [
            " -> ".join(repr(_short(text)) for text in (pair.prompt, pair.positive.response, pair.negative.response))
            for pair in self.pairs[:1]
        ]
        return f"Pairs({', '.join([f'n={len(self)}', *shown])})"

    def split(
        self, train: float = 0.6, validation: float = 0.2, test: float = 0.2, seed: int = 0
    ) -> tuple[Pairs, Pairs, Pairs]:
        """Divide the pairs at random into training, validation and test pairs, which share no prompt.

        Args:
            train, validation, test: the fractions, which add up to 1.

        Raises:
            RecipeError: other fractions, or a part without a pair.
        """
        fractions = (train, validation, test)
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise RecipeError(f"Pairs.split: found the fractions {fractions}; needed: all above 0, with the sum 1.")
        order = random.Random(seed).sample(range(len(self)), len(self))
        first, second = round(train * len(self)), round((train + validation) * len(self))
        # Each part keeps the order of the pairs, so that a file's first rows stay the first of their part.
        parts = [
            Pairs(tuple(self.pairs[n] for n in sorted(part)))
            for part in (order[:first], order[first:second], order[second:])
        ]
        if not all(parts):
            sizes = ", ".join(f"{len(part)} for {name}" for name, part in zip(SPLITS, parts, strict=True))
            raise RecipeError(f"Pairs.split: {len(self)} pairs give {sizes}; needed: 1 or more for each. Add pairs.")
        return parts[0], parts[1], parts[2]

    def to_behaviour(
        self,
        *,
        neutral: Sequence[str | Text] | None = None,
        heldout: Sequence[str | Text] | None = None,
        calibration: Sequence[str | Text] | None = None,
        train: float = 0.6,
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
    ) -> Behaviour:
        """Return all the data that the stages need, from these pairs and from texts on other topics.

        Each part that is not given gets a tenth of the pairs, which then are in no split; a warning says so. That is
        enough to try things out, but only texts on other topics show what steering does there.

        Args:
            neutral: control texts, which measure the KL from the base and the perplexity. A plain string is divided
                in the middle: its first words are the prompt, the others the response.
            heldout: prompts that only the verification sees.
            calibration: prompts that the compiler may see besides the training pairs.
            train, validation, test, seed: see `split`.

        Raises:
            RecipeError: a prompt that occurs twice, an unusable text, or too few pairs.
        """
        sources = {"neutral": neutral, "heldout": heldout, "calibration": calibration}
        problems: list[str] = []
        parts = {name: _texts(name, texts, problems) for name, texts in sources.items() if texts is not None}
        missing = [name for name in sources if name not in parts]
        size = max(1, len(self) // 10)
        order = random.Random(seed).sample(range(len(self)), len(self))
        for n, name in enumerate(missing):
            taken = [self.pairs[row] for row in order[n * size : (n + 1) * size]]
            # The negative response is what the model says without the behaviour, so it can serve as control text.
            parts[name] = tuple(Text(p.prompt, p.negative.response if name == "neutral" else "") for p in taken)
        rest = Pairs(tuple(self.pairs[row] for row in sorted(order[len(missing) * size :])))
        prompts = {name: [text.prompt for text in texts] for name, texts in parts.items()}
        problems += repeated_prompts({"pairs": [pair.prompt for pair in rest], **prompts})
        if problems:
            raise RecipeError(problems)
        splits = dict(zip(SPLITS, rest.split(train, validation, test, seed), strict=True))
        if missing:
            warnings.warn(
                f"no {', no '.join(missing)} texts were given: each part gets {size} of the {len(self)} pairs, which "
                f"leaves {len(rest)} for training, validation and test",
                stacklevel=2,
            )
        rows: dict[str, list[Any]] = {name: [asdict(pair) for pair in part] for name, part in splits.items()}
        rows |= {name: [asdict(text) for text in texts] for name, texts in parts.items()}
        return Behaviour(
            splits["train"].pairs,
            splits["validation"].pairs,
            splits["test"].pairs,
            parts["neutral"],
            parts["heldout"],
            parts["calibration"],
            {name: digest(content) for name, content in rows.items()},
        )


def read_pairs(key: str, path: Path) -> list[Pair]:
    """Read pairs that are no split of the recipe's data; raises `RecipeError` with lines that name the recipe's `key`."""
    reader = Reader(path.parent, section="")
    rows = reader.rows(key, Path(path.name), KEYS)
    if reader.problems:
        raise RecipeError(reader.problems)
    return [_pair(row) for row in rows]


def _pair(row: Row) -> Pair:
    return Pair(Text(row["prompt"], row["positive"]), Text(row["prompt"], row["negative"]), row["prompt"])


def _checked(located: Sequence[Located], problems: list[str]) -> Pairs:
    """Return the pairs of the rows; raises `RecipeError` with `problems` and all others."""
    pairs: list[Pair] = []
    first: dict[str, str] = {}
    for where, row in located:
        if isinstance(row, Pair):
            pair = row
        else:
            values = dict(zip(KEYS, row, strict=True)) if isinstance(row, tuple | list) and len(row) == 3 else row
            checked = checked_row(where, values, KEYS, (), problems)
            if checked is None:
                continue
            pair = _pair(checked)
        if normalized(pair.prompt) in first:
            problems.append(f"{where}: the prompt '{pair.prompt}' is in {first[normalized(pair.prompt)]} too.")
        if asdict(pair.positive) == asdict(pair.negative):
            problems.append(f"{where}: positive and negative are the same text '{_short(pair.positive.response)}'.")
        first.setdefault(normalized(pair.prompt), where)
        pairs.append(pair)
    if not pairs and not problems:
        problems.append("found 0 pairs; needed: 1 or more.")
    if problems:
        more = [f"{len(problems) - MAX_LINES} more rows like these."] * (len(problems) > MAX_LINES)
        raise RecipeError([*problems[:MAX_LINES], *more])
    return Pairs(tuple(pairs))


def _texts(name: str, texts: Sequence[str | Text], problems: list[str]) -> tuple[Text, ...]:
    """Return a part's texts, with a line in `problems` for each that cannot be used."""
    parsed: list[Text] = []
    for n, text in enumerate(texts):
        if isinstance(text, str):
            words = text.split(" ")
            middle = len(words) // 2 if name == "neutral" else len(words)
            text = Text(" ".join(words[:middle]), " ".join(words[middle:]))
        needed = "a prompt and a response (of a plain string, two words or more)" if name == "neutral" else "a prompt"
        if not text.prompt.strip() or (name == "neutral" and not text.response.strip()):
            problems.append(f"{name}, text {n}: found {_short(text.prompt + text.response)!r}; needed: {needed}.")
        parsed.append(text)
    if not parsed:
        problems.append(f"{name}: found 0 texts; needed: 1 or more, or leave it out to take them from the pairs.")
    return tuple(parsed)


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def pairs_sha256(pairs: Sequence[Pair]) -> str:
    """Return the hash of another behaviour's pairs, empty where there are none."""
    return digest([asdict(pair) for pair in pairs]) if pairs else ""
