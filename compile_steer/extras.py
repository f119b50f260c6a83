"""Libraries that only some recipes need: the extras of this package."""

from __future__ import annotations

import importlib.util

from compile_steer.errors import RecipeError


def require_library(library: str, extra: str, what: str, otherwise: str = "") -> None:
    """Raise `RecipeError` where the `library` that `what` needs, and `extra` installs, is not there.

    Args:
        otherwise: a sentence on what to do without it.
    """
    if importlib.util.find_spec(library.replace("-", "_")) is None:
        raise RecipeError(
            f"{what} needs the library {library}, which is not installed: pip install 'compile-steer[{extra}]'. "
            f"{otherwise}".rstrip()
        )
