"""A behaviour's data, whatever they come from: contrast pairs in three disjoint splits, and prompts.

Every `kind` of the recipe's `data` is a section of its own, and reads itself into a `Behaviour`.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from compile_steer.behaviour.behaviour import (
    SPLITS,
    Behaviour,
    Check,
    Pair,
    Question,
    asked_key,
    require_distinct,
)
from compile_steer.behaviour.choices import Choices
from compile_steer.behaviour.pairs import Pairs, read_pairs
from compile_steer.behaviour.prompts import Instructions, Written
from compile_steer.behaviour.section import DataSection, Write


def _kind(value: Any) -> str:
    """The kind that a section names; contrast pairs where it names none."""
    found = value.get("kind", "pairs") if isinstance(value, dict) else getattr(value, "kind", "pairs")
    return str(found)


Data = Annotated[
    Annotated[Pairs, Tag("pairs")]
    | Annotated[Choices, Tag("choices")]
    | Annotated[Instructions, Tag("instructions")]
    | Annotated[Written, Tag("written")],
    Discriminator(_kind),
]

__all__ = [
    "SPLITS",
    "Behaviour",
    "Check",
    "Choices",
    "Data",
    "DataSection",
    "Instructions",
    "Pair",
    "Pairs",
    "Question",
    "Write",
    "Written",
    "asked_key",
    "read_pairs",
    "require_distinct",
]
