"""What every section of a recipe has in common, and how wrong values are explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError

from compile_steer.common.errors import brief

if TYPE_CHECKING:
    from pydantic_core import CoreSchema, ErrorDetails


# Of every number that its own field does not limit further. What is larger is a mistake, or cannot be computed.
_LARGEST = {"int": 10**6, "float": 10**9}
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]  # what Python, numpy and torch all take


def each_once(values: Any) -> Any:
    """A validator: a list names at least one value, and none twice."""
    if isinstance(values, tuple) and (not values or len(set(values)) < len(values)):
        raise ValueError("name at least one, and each once")
    return values


def _limit(schema: Any) -> None:
    """Make every scalar within a pydantic schema strict, and limit its numbers."""
    if isinstance(schema, dict):
        if schema.get("type") in ("int", "float", "bool", "str"):
            schema["strict"] = True
        if schema.get("type") in ("int", "float"):
            schema.setdefault("le", _LARGEST[schema["type"]])
            schema.setdefault("ge" if "gt" not in schema else "gt", -_LARGEST[schema["type"]])
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list | tuple) else ():
        _limit(part)


class Section(BaseModel):
    """Keys that are not known are errors, and values do not change.

    A count is at most a million, another number at most 1e9, if its field does not say more; neither is text or true, and no
    count has a fraction. A list is as good as a tuple.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _limit(schema)
        return schema


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
    value = "" if between_keys else f"found {brief(item['input'])}; "
    return f"{place}{value}{message[0].lower()}{message[1:]}"
