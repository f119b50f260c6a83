"""What every section of a recipe has in common, and how wrong values are explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from compile_steer.common.errors import brief

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Section(BaseModel):
    """Keys that are not known are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def dotted(steps: Sequence[int | str]) -> str:
    """The path to a value: grid.0.layer."""
    return ".".join(map(str, steps))


def explain(error: ValidationError, where: Callable[[Sequence[int | str]], str] = dotted) -> list[str]:
    """Return one line a problem: the key, what was found, what was needed."""
    return [explain_one(item, where(item["loc"])) for item in error.errors()]


def explain_one(item: ErrorDetails, where: str) -> str:
    """Return the line for the problem of the key `where`, '' for the whole."""
    place = f"{where}: " if where else ""
    if item["type"].startswith("missing"):
        return f"{place}missing"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}unknown key"
    message = item["msg"].removeprefix("Value error, ").removesuffix(".")  # our own are whole sentences
    # A rule between several keys names them itself: its input is the whole section.
    between_keys = item["type"] == "value_error" and isinstance(item["input"], dict)
    found = "" if between_keys else f"found {brief(item['input'])}; "
    return f"{place}{found}{message[0].lower()}{message[1:]}"
