"""Run the campaign and write docs/RELIABILITY.md.

`--short`: always the same sample of it, in at most three minutes; fails where anything does. Other words: only the bad
inputs whose names contain them all.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.campaign import bad_input, jobs, trial
from benchmarks.campaign.report import RECORD, lines

CONSOLE = Console(width=160, highlight=False, markup=False)


def campaign(short: bool) -> tuple[list[jobs.Finding], float]:
    """Everything, or the sample of the short form, by two processes; and the seconds of a start."""
    found: list[jobs.Finding] = []
    with tempfile.TemporaryDirectory() as parent:
        # How long a start takes depends on what else runs: the short form, which must not fail by chance, leaves it out.
        setting = jobs.prepared(Path(parent).resolve(), timed=not short)
        chosen = (jobs.short if short else jobs.full)(setting.sound)
        # Forked before anything started a thread; each forks what it tries.
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            for part in pool.imap_unordered(partial(jobs.guarded, setting=setting), chosen, chunksize=1):
                found += part
                for one in part:
                    if one.problem:
                        CONSOLE.print(f"{one.row}: {one.name}: {one.problem}")
        points, states = setting.sound.points, len(list(setting.states.iterdir()))
    found.append(jobs.Finding("points", f"{points} write points, {states} different states"))
    return found, setting.start


def try_inputs(words: Sequence[str]) -> int:
    """Try the bad inputs whose names contain all words, and print what is wrong with the answers; returns how many."""
    failed = 0
    chosen = [bad for bad in bad_input.all_inputs() if all(word in bad.name for word in words)]
    with tempfile.TemporaryDirectory() as parent:
        setting = jobs.prepared(Path(parent).resolve(), timed=False)
        for result in bad_input.attempts(setting.base, chosen, setting.start):
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
    began = time.monotonic()
    trial.import_everything()
    words = sys.argv[1:]
    if words and words != ["--short"]:
        sys.exit(bool(try_inputs(words)))
    found, start = campaign(bool(words))
    minutes = (time.monotonic() - began) / 60
    failed = [one for one in found if one.problem]
    if not words:
        RECORD.save(*lines(found, minutes, start))
    CONSOLE.print(f"{len(found)} trials, {len(failed)} failed, {minutes:.1f} minutes.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
