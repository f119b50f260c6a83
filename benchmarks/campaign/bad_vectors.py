"""vectors."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.campaign.case import Bad


def inputs() -> Iterator[Bad]:
    """None yet."""
    yield from ()
