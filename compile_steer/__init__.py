"""Compile a steering vector into ordinary weights, and prove that they match."""

import sys

# Python looks for modules in the current folder first when it runs one with -m, where a stranger's `secrets.py` or
# `torch.py` may lie. This comes before any import that reads a file, `__future__` included.
if sys.argv[:1] == ["-m"] and "compile_steer" in sys.orig_argv and not sys.flags.safe_path:
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compile_steer.api import CompiledProgram, compile, extract, merge, steered, validate, verify
    from compile_steer.data.behaviour import Behaviour
    from compile_steer.data.pairs import Pairs
    from compile_steer.models.load import load
    from compile_steer.report.recommendation import recommend
    from compile_steer.steering.directions import Directions
    from compile_steer.steering.program import Intervention, Program
    from compile_steer.steering.sites import Site

# Imported on first use, so that the command line answers before torch is loaded.
_MODULES = {
    **dict.fromkeys(("CompiledProgram", "compile", "extract", "merge", "steered", "validate", "verify"), "api"),
    "Behaviour": "data.behaviour",
    "Pairs": "data.pairs",
    "load": "models.load",
    "recommend": "report.recommendation",
    "Directions": "steering.directions",
    "Intervention": "steering.program",
    "Program": "steering.program",
    "Site": "steering.sites",
}

__all__ = [
    "Behaviour",
    "CompiledProgram",
    "Directions",
    "Intervention",
    "Pairs",
    "Program",
    "Site",
    "compile",
    "extract",
    "load",
    "merge",
    "recommend",
    "steered",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'compile_steer' has no attribute '{name}'")
    return getattr(import_module(f"compile_steer.{_MODULES[name]}"), name)
