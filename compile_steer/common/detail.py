"""How much a command prints."""

from __future__ import annotations

from contextvars import ContextVar
from enum import IntEnum


class Detail(IntEnum):
    """The result in a line; what is needed to act on it; every figure."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


detail: ContextVar[Detail] = ContextVar("detail", default=Detail.NORMAL)
