"""A behaviour's data: contrast pairs in three disjoint splits, and prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compile_steer.errors import RecipeError
from compile_steer.files import digest
from compile_steer.tokens import Text

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in the behaviour, and the plain prompt that both came from."""

    positive: Text
    negative: Text
    prompt: str


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
    """All data of one behaviour. The splits share no prompt and no response, checked when read.

    `neutral` texts measure drift and perplexity, `heldout` prompts (other topics) are for verification
    alone, `calibration` prompts are what the compiler may see besides the training pairs. By plain prompt:
    `questions` where the data are multiple choice, `checks` where they name what an answer must satisfy.
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


class Reader:
    """Reads JSONL files and gathers every problem, to be raised once."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.hashes: dict[str, str] = {}

    def rows(self, name: str, path: Path, keys: Sequence[str], *, turns: bool = False) -> list[dict[str, Any]]:
        """The rows of one file; a row with a missing, extra, empty or non-text field is a problem.

        Args:
            turns: rows may have a `history`, a list of [user, assistant] texts.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"data.{name}: {path} cannot be read ({getattr(error, 'strerror', None) or error}).")
            return []
        rows = [
            row for n, line in enumerate(lines, 1) if line.strip() and (row := self._row(path, n, line, keys, turns))
        ]
        if not rows and not any(line.strip() for line in lines):
            self.problems.append(
                f"data.{name}: {path} is empty; needed: one JSON object a line with {', '.join(keys)}."
            )
        self.hashes[name] = digest(rows)
        return rows

    def _row(self, path: Path, number: int, line: str, keys: Sequence[str], turns: bool) -> dict[str, Any] | None:
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            self.problems.append(f"{where}: not JSON ({error.msg}).")
            return None
        history = row.pop("history", []) if turns and isinstance(row, dict) else []
        if not _is_history(history):
            self.problems.append(
                f"{where}: history must be a list of [user, assistant] pairs of texts that are not empty."
            )
            return None
        if not isinstance(row, dict) or set(row) != set(keys):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            self.problems.append(f"{where}: found {found}; needed the keys {', '.join(keys)}.")
            return None
        bad = [key for key in keys if not isinstance(row[key], str) or not row[key].strip()]
        if bad:
            self.problems.append(f"{where}: {', '.join(bad)} must be text that is not empty.")
            return None
        return {key: row[key] for key in keys} | ({"history": history} if history else {})


def _is_history(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) and said.strip() for said in turn)
        for turn in value
    )


def read_behaviour(files: dict[str, Path], positive_template: str, negative_template: str) -> Behaviour:
    """Read and check all data of a behaviour; raises one `RecipeError` with every problem.

    Args:
        files: paths by name: train, validation, test, neutral, heldout, calibration.
        positive_template, negative_template: what the user says in each side of a pair; `{prompt}` stands
            for the row's prompt ("{prompt} Answer in lowercase." against "{prompt}").
    """
    reader = Reader()
    rows = {name: reader.rows(name, files[name], ("prompt", "positive", "negative")) for name in SPLITS}
    neutral = reader.rows("neutral", files["neutral"], ("prompt", "response"), turns=True)
    prompts = {name: reader.rows(name, files[name], ("prompt",), turns=True) for name in ("heldout", "calibration")}
    reader.problems += _repeats({**rows, "neutral": neutral, **prompts})
    for name, template in (("positive", positive_template), ("negative", negative_template)):
        if template.count("{prompt}") != 1:
            reader.problems.append(f"data.{name}_template '{template}' must contain {{prompt}} exactly once.")
    for name in SPLITS:
        same = [row["prompt"] for row in rows[name] if row["positive"].strip() == row["negative"].strip()]
        if same and positive_template == negative_template:
            reader.problems.append(
                f"data.{name}: positive and negative are the same text for '{same[0]}' ({len(same)} pairs)."
            )
    if reader.problems:
        raise RecipeError(reader.problems)

    def pairs(name: str) -> tuple[Pair, ...]:
        return tuple(
            Pair(
                Text(positive_template.replace("{prompt}", row["prompt"]), row["positive"]),
                Text(negative_template.replace("{prompt}", row["prompt"]), row["negative"]),
                row["prompt"],
            )
            for row in rows[name]
        )

    return Behaviour(
        pairs("train"),
        pairs("validation"),
        pairs("test"),
        tuple(map(_text, neutral)),
        tuple(map(_text, prompts["heldout"])),
        tuple(map(_text, prompts["calibration"])),
        reader.hashes,
    )


def read_pairs(key: str, path: Path) -> list[Pair]:
    """Pairs outside of the splits, rows as of the training data; raises one `RecipeError` that names the recipe's `key`."""
    reader = Reader()
    rows = reader.rows(key, path, ("prompt", "positive", "negative"))
    if reader.problems:
        raise RecipeError([problem.replace(f"data.{key}", key) for problem in reader.problems])
    return [
        Pair(Text(row["prompt"], row["positive"]), Text(row["prompt"], row["negative"]), row["prompt"]) for row in rows
    ]


def _text(row: dict[str, Any]) -> Text:
    history = tuple((user, assistant) for user, assistant in row.get("history", []))
    return Text(row["prompt"], row.get("response", ""), history)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _repeats(files: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """A line for each prompt that stands twice, within a file or across files, and for each response across splits."""
    answers: dict[str, str] = {}
    for name in SPLITS:
        for text in {_key(row[side]) for row in files[name] for side in ("positive", "negative")}:
            before = answers.setdefault(text, name)
            if before != name:
                yield f"data: the response '{text}' is in both {before} and {name}; the splits must not overlap."
    seen: dict[str, str] = {}
    for name, rows in files.items():
        for row in rows:
            before = seen.setdefault(_key(row["prompt"]), name)
            if before != name:
                yield f"data: the prompt '{row['prompt']}' is in both {before} and {name}; the splits must not overlap."
        keys = [_key(row["prompt"]) for row in rows]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            yield f"data.{name}: the prompt '{key}' stands {keys.count(key)} times."
