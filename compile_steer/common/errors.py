"""The errors a user can cause, each with one message that says what was found, needed and what to do.

Whoever raises one has gathered every problem of that input first, so that nobody corrects a recipe one line at a time. The
command line prints the message and exits with code 2; a check that ran and failed is a result, not an error (code 1).
"""

from __future__ import annotations

import importlib.util
import reprlib
from collections.abc import Sequence


class CompileSteerError(Exception):
    """Base of every error that is the input's fault. `problems` holds one line per problem."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class RecipeError(CompileSteerError):
    """A recipe, its data or a command line value is unusable."""


class LayoutError(CompileSteerError):
    """The model is missing, of an unknown family, or lacks the site that was asked for."""


class CannotLower(CompileSteerError):
    """No backend or file format, or not the one asked for, can express the program."""


class ArtifactError(CompileSteerError):
    """A file on disk is missing, damaged, foreign, or made for another model."""


class EngineError(CompileSteerError):
    """A serving engine is not installed, or its worker crashed, hung or left no answer."""


def several(problems: Sequence[str], shown: int = 5) -> list[str]:
    """The first problems, and how many more there are: a wrong file repeats one mistake thousands of times."""
    more = len(problems) - shown
    return [*problems[:shown], *([f"{more} more like this."] if more > 0 else [])]


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: object) -> str:
    """A value from outside as Python writes it, but on one short line: control codes are escaped, the middle is left out."""
    return _BRIEF.repr(value)


def require_library(library: str, extra: str, what: str, otherwise: str = "") -> None:
    """Raise `RecipeError` where the `library` that `what` needs is missing; `otherwise` is a sentence on doing without it."""
    if importlib.util.find_spec(library.replace("-", "_")) is None:
        raise RecipeError(
            f"{what} needs the library {library}, which is not installed: pip install 'compile-steer[{extra}]'. "
            f"{otherwise}".rstrip()
        )


class InternalError(Exception):
    """Something of ours went wrong that no input should be able to cause: exit code 3."""
