"""Run the campaign and write docs/RELIABILITY.md; with words, try only the bad inputs whose names contain them all."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from benchmarks.campaign import bad_input, trial
from benchmarks.campaign.case import Case, finish, prepare

CONSOLE = Console(width=160, highlight=False, markup=False)


@contextmanager
def base_case() -> Iterator[Case]:
    """A case with its finished run, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as parent:
        case = prepare(Path(parent).resolve() / "base")
        finish(case)
        yield case


def try_inputs(words: list[str]) -> int:
    """Try the bad inputs whose names contain all words, and print what is wrong with the answers; returns how many."""
    start, failed = time.process_time(), 0
    chosen = [bad for bad in bad_input.all_inputs() if all(word in bad.name for word in words)]
    with base_case() as base:
        for result in bad_input.attempts(base, chosen, start):
            failed += bool(result.problems)
            CONSOLE.print(f"{result.name}: {'; '.join(result.problems) or 'refused as it must be'}")
            CONSOLE.print(f"    {result.outcome.last_line}")
    CONSOLE.print(f"{len(chosen)} inputs, {failed} not refused as they must be.")
    return failed


def main() -> None:
    """Import everything once, then try."""
    if any(os.environ.get(name) != value for name, value in trial.QUIET.items()):
        # Before anything heavy was imported, by an interpreter that finds them set.
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.campaign", *sys.argv[1:]], {**os.environ, **trial.QUIET}
        )
    trial.import_everything()
    sys.exit(bool(try_inputs(sys.argv[1:])))


if __name__ == "__main__":
    main()
