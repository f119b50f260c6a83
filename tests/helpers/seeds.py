"""Seeds from names."""

from __future__ import annotations

import zlib


def stable_seed(name: str) -> int:
    """A seed in [0, 2^32) that is the same in every process; Python's own `hash` of a string is not."""
    return zlib.crc32(name.encode())
