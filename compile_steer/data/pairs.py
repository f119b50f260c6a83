"""Contrast pairs as they stand: a prompt, and a response of either side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS
from compile_steer.data.section import DataSection, Rows, fill, folded, template_problems
from compile_steer.data.sources import Reader, Row
from compile_steer.models.text import Pair, Text


class TwoSided(DataSection):
    """What each side of a pair is asked: `{prompt}` stands for the row's prompt, and a system prompt may go before.

    ("{prompt} Answer in lowercase." against "{prompt}".) The plain prompt is what is measured in the end.
    """

    positive_template: str = "{prompt}"
    negative_template: str = "{prompt}"
    positive_system: str = ""
    negative_system: str = ""

    @property
    def same_question(self) -> bool:
        """True if both sides are asked alike."""
        sides = ((self.positive_template, self.positive_system), (self.negative_template, self.negative_system))
        return sides[0] == sides[1]

    def ask(self, prompt: str, positive: str = "", negative: str = "") -> Pair:
        """The pair of a prompt, with what each side answers."""
        return Pair(
            Text(fill(self.positive_template, prompt=prompt), positive, system=self.positive_system),
            Text(fill(self.negative_template, prompt=prompt), negative, system=self.negative_system),
            prompt,
        )

    def problems(self, rows: Rows) -> Iterator[str]:  # noqa: ARG002  (those of the templates)
        yield from template_problems("positive_template", self.positive_template, "{prompt}")
        yield from template_problems("negative_template", self.negative_template, "{prompt}")


class Pairs(TwoSided):
    """Rows {"prompt", "positive", "negative"}; no response may be in two splits."""

    kind: Literal["pairs"] = "pairs"
    keys = ("prompt", "positive", "negative")

    def pair(self, row: Row) -> Pair:
        return self.ask(row["prompt"], row["positive"], row["negative"])

    def problems(self, rows: Rows) -> Iterator[str]:
        yield from _shared_responses(rows)
        yield from super().problems(rows)
        for name in SPLITS:
            same = [row["prompt"] for row in rows[name] if row["positive"].strip() == row["negative"].strip()]
            if same and self.same_question:
                yield f"data.{name}: positive and negative are the same text for '{same[0]}' ({len(same)} pairs)."


def read_pairs(key: str, path: Path) -> list[Pair]:
    """Pairs outside of the splits, rows as of the training data; raises one `RecipeError` that names the recipe's `key`."""
    reader = Reader(path.parent)
    rows = reader.rows(key, Path(path.name), Pairs.keys)
    if reader.problems:
        raise RecipeError([problem.replace(f"data.{key}", key) for problem in reader.problems])
    return [
        Pair(Text(row["prompt"], row["positive"]), Text(row["prompt"], row["negative"]), row["prompt"]) for row in rows
    ]


def _shared_responses(rows: Rows) -> Iterator[str]:
    """A line for each response that is in two splits."""
    answers: dict[str, str] = {}
    for name in SPLITS:
        for text in sorted({folded(row[side]) for row in rows[name] for side in ("positive", "negative")}):
            before = answers.setdefault(text, name)
            if before != name:
                yield f"data: the response '{text}' is in both {before} and {name}; the splits must not overlap."
