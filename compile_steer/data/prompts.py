"""Prompts whose answers the model itself writes, on either side of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from compile_steer.data.behaviour import SPLITS, Check
from compile_steer.data.pairs import TwoSided
from compile_steer.data.section import DataSection, Rows, Write
from compile_steer.data.sources import Row
from compile_steer.models.text import Pair, Text


class Written(TwoSided):
    """Rows {"prompt"}: the model answers each under either side's template and system prompt.

    What it wrote is a pair only if the recipe's scorer finds the behaviour on the positive side alone.
    """

    kind: Literal["written"]
    write: Write = Write()
    keys = ("prompt",)

    @property
    def writing(self) -> Write:
        return self.write

    def pair(self, row: Row) -> Pair:
        return self.ask(row["prompt"])

    def problems(self, rows: Rows) -> Iterator[str]:
        yield from super().problems(rows)
        if self.same_question:
            yield (
                "data: both sides are asked alike, so the model would answer them alike. Set positive_template (for example "
                "'{prompt} Answer as a pirate.') or positive_system."
            )


class Instructions(DataSection):
    """Rows {"prompt", "instruction"}: asked with the instruction after the prompt, and without (Stolfo et al. 2410.12877).

    `checks`, if a row has any, are what an answer must satisfy: [{"id": ..., "arguments": {...}}]. The model writes
    the answers.
    """

    kind: Literal["instructions"]
    write: Write = Write()
    keys = ("prompt", "instruction")
    optional = ("checks",)

    @property
    def writing(self) -> Write:
        return self.write

    def pair(self, row: Row) -> Pair:
        return Pair(Text(f"{row['prompt']} {row['instruction']}"), Text(row["prompt"]), row["prompt"])

    def problems(self, rows: Rows) -> Iterator[str]:  # noqa: ARG002  (each row says all it needs)
        return iter(())

    def checks(self, rows: Rows) -> Mapping[str, tuple[Check, ...]]:
        found = [row for name in SPLITS for row in rows[name] if row.get("checks")]
        return {row["prompt"]: tuple(map(_check, row["checks"])) for row in found}


def _check(given: Row) -> Check:
    """An argument that is null is none: in a table every row has every column."""
    arguments = given.get("arguments") or {}
    return Check(given["id"], tuple(sorted((name, value) for name, value in arguments.items() if value is not None)))
