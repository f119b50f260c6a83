"""The entry point, and the one boundary: every way that a command can end becomes an exit code and at most a short message.

Nothing heavy is imported before the signal handlers are in place, so that Ctrl-C in the seconds that torch takes to load
ends as quietly as later.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NoReturn

_MOST_PROBLEMS = 50  # that are printed


class _Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. Not KeyboardInterrupt, which the command-line library turns into an exit code of its own."""


_stops: list[int] = []  # the signals that came


def _stop(number: int, _frame: object) -> NoReturn:
    _stops.append(number)
    raise _Stopped


def _set_handlers() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, _stop)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """Python cannot raise what comes up inside a destructor, and would print it: a stop is raised again a little later."""
    if unraisable.exc_type is _Stopped:
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, 0.05)


def _open_streams() -> None:
    """Give the process its three streams, where it was started without one, in forms that cannot fail on a text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # otherwise the next file that is opened would get what is printed
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    from io import StringIO

    sys.stdin = StringIO()  # no command asks anything, so no library shall


def _run() -> int:
    from compile_steer.cli.app import app
    from compile_steer.common.errors import RecipeError

    empty = [word for word in sys.argv[1:] if not word or (word.startswith("--") and word.find("=") == len(word) - 1)]
    if empty:
        raise RecipeError(
            f"an argument is empty ({empty[0] or repr('')}): the shell may have a variable that is not set."
        )
    code = app(prog_name="compile-steer", standalone_mode=False)
    sys.stdout.flush()  # here, where a full disk or a closed pipe is still an error that can be told
    return code if isinstance(code, int) else 0


def _end(error: BaseException) -> int:
    """Return the exit code for what a command raised, after telling the user."""
    # This module alone: what a stop interrupted while it was imported, a C library perhaps, may not bear a second import.
    from compile_steer.common.errors import CompileSteerError, disk_remedy, is_child

    if _stops or isinstance(error, (_Stopped, KeyboardInterrupt)):  # whatever a library made of the stop
        if not is_child():  # the command that it works for says so
            _tell(["stopped. Nothing half-written is left; the same command goes on where it was."])
        return 128 + (_stops[0] if _stops else signal.SIGINT)  # as shells count a signal
    if any(isinstance(cause, BrokenPipeError) for cause in _chain(error)):
        with suppress(OSError, ValueError):  # Python would try to print the rest at exit, and fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, CompileSteerError):
        _tell(error.problems)
    elif hasattr(error, "format_message"):  # the command line's own: an unknown option, a value of another type
        _tell_usage(error)
    elif isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        needed = "a smaller model or batch, dtype bfloat16, or a machine with more"
        _tell([f"there is not enough memory for this ({_first_line(error)}). Use {needed}."])
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        cure = f"Nothing half-written is left. {disk_remedy(error.errno)}, or name another place."
        _tell([f"{error.strerror or error}{where}. {cure}"])
    else:
        _tell([_internal(error)])
        return 3
    return 2


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _tell(problems: Sequence[str]) -> None:
    from compile_steer.common.errors import plain

    more = len(problems) - _MOST_PROBLEMS
    lines = [*problems[:_MOST_PROBLEMS], *([f"{more} more problems."] if more > 0 else [])]
    with suppress(OSError, ValueError):  # nobody reads the error stream
        # One line a problem: a name with a line break cannot pretend to be another message.
        shown = (plain(line).replace("\n", "\\n") for line in lines)
        print(*(f"error: {line}" for line in shown), sep="\n", file=sys.stderr, flush=True)


def _tell_usage(error: BaseException) -> None:
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # its help is on the screen already, or is its message
        print(error.format_message(), end="")  # type: ignore[attr-defined]  # of a class that the library keeps private
        return
    command = "compile-steer" if context is None else context.command_path
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]  # as above
    _tell([f"{message}. See '{command} --help'."])


def _first_line(error: BaseException) -> str:
    from compile_steer.common.errors import brief

    return f"{type(error).__name__}: {brief(next(iter(str(error).splitlines()), ''))}"


def _internal(error: BaseException) -> str:
    """Leave the traceback in a file, where it can be sent from; returns a short message with its place."""
    import tempfile
    import traceback
    from pathlib import Path

    from compile_steer.common.errors import InternalError

    try:
        with tempfile.NamedTemporaryFile("w", prefix="compile-steer-", suffix=".log", delete=False) as log:
            try:
                traceback.print_exception(error, file=log)
                log.flush()
            except OSError:
                Path(log.name).unlink()
                raise
        kept = f"the traceback is in {log.name}"
    except OSError as problem:
        kept = f"the traceback could not be kept ({problem.strerror or problem}; TMPDIR names a place for it)"
    message = str(error) if isinstance(error, InternalError) else f"{_first_line(error)}."
    return f"{message} This is an error of compile_steer, not of the input; {kept}."


def main() -> None:
    """Run the command line."""
    try:
        _set_handlers()
        _open_streams()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # What the libraries' imports make stays: looking through it again and again takes a second of five.
        gc.set_threshold(50_000)
        code = _run()
    except BaseException as error:  # the boundary: exit code 1 is for a check that ran and failed, never for a crash
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # until the message is out
        code = _end(error)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


if __name__ == "__main__":
    main()
