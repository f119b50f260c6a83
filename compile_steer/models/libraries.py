"""The libraries that load models, made quiet, and their errors translated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

from compile_steer.common import errors
from compile_steer.common.errors import CompileSteerError


@contextmanager
def library_errors(explain: Callable[[str], CompileSteerError]) -> Iterator[None]:
    """Silence the libraries that load models, and raise `explain(reason)` where they fail on a file or name."""
    with errors.library_errors(explain), quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and all warnings inside the block."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
