"""The entry point: every error that is the input's fault becomes a message and exit code 2, never a traceback.

Nothing heavy is imported before the signal handlers are in place, so that Ctrl-C in the seconds that torch
takes to load ends as quietly as later.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

from compile_steer.common.errors import CompileSteerError, InternalError


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not KeyboardInterrupt, which the command-line library turns into exit code 1."""


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise _Stopped


def _fail(problems: Sequence[str], code: int = 2) -> NoReturn:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


def _fail_internally(error: Exception) -> NoReturn:
    """Leave the traceback in a file, where it can be sent from, and a short message on the screen."""
    with tempfile.NamedTemporaryFile("w", prefix="compile-steer-", suffix=".log", delete=False) as log:
        traceback.print_exception(error, file=log)
    message = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}"
    _fail([f"{message} This is an error of compile_steer, not of the input; the traceback is in {log.name}."], code=3)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        from compile_steer.cli.app import app

        app()
    except CompileSteerError as error:
        _fail(error.problems)
    except _Stopped:
        _fail(["stopped. Nothing half-written is left; the same command goes on where it was."])
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail([f"{error.strerror or error}{where}. Nothing half-written is left; free space or choose another --out."])
    except Exception as error:  # the one boundary: exit code 1 is for a check that ran and failed, never for a crash
        _fail_internally(error)


if __name__ == "__main__":
    main()
