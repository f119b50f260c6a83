"""A behaviour's data, whatever they come from: contrast pairs in three disjoint splits, and prompts.

Every `kind` of the recipe's `data` is a section of its own, and reads itself into a `Behaviour`.
"""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from compile_steer.data.choices import Choices
from compile_steer.data.pairs import Pairs
from compile_steer.data.prompts import Instructions, Written


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
