"""Compile a steering vector into ordinary weights, and prove that they match."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compile_steer.steering.hooks import steered
    from compile_steer.steering.program import Intervention, Program
    from compile_steer.steering.sites import Site

__all__ = ["Intervention", "Program", "Site", "steered"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that the command line can answer before torch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module 'compile_steer' has no attribute '{name}'")
    return getattr(
        import_module("compile_steer.steering.hooks" if name == "steered" else "compile_steer.steering.program"), name
    )
