"""Two commands in one output folder at once: the second must say who holds it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign import kills, trial
from benchmarks.campaign.case import NAME, RUN, Case

RECIPE = f"recipes/{NAME}.yaml"
ADAPTER = f"out/adapters/{NAME}-bias"
SECOND: tuple[tuple[str, ...], ...] = (
    RUN,
    ("extract", RECIPE, "--out", "out"),
    ("validate", RECIPE, "--out", "out", "--set", "seed=9"),
    ("compile", RECIPE, "--out", "out", "--force"),
    ("merge", RECIPE, "--out", "out"),
    ("verify", RECIPE, "--out", "out"),
    ("export-vector", RECIPE, "--out", "out"),
    ("decompile", RECIPE, "--out", "out", "--artifact", ADAPTER),
    ("task-vector", RECIPE, "--out", "out", "--artifact", ADAPTER),
)


def tried(case: Case, sound: kills.Sound) -> Iterator[tuple[str, str]]:
    """Stop a run at 60 % of its write points, start others beside it, let it go on; yields (name, what went wrong)."""
    kills.clear(case)

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def prepare() -> None:
        trial.repeatable()
        kills.WritePoints(case.root / "out", kills.at(int(0.6 * sound.points), stop)).install()

    process, files = trial.start(RUN, case.root, prepare)
    while _state(process) not in "TZ":
        time.sleep(trial.POLL)
    for command in SECOND:
        outcome = trial.run(command, case.root)
        said = str(process) in outcome.errors or "another" in outcome.errors
        wrong = "" if outcome.code == 2 and said else f"exit code {outcome.code} ({outcome.last_line})"
        yield f"{command[0]} beside a run", wrong
    os.killpg(process, signal.SIGCONT)
    first = trial.wait(process, files, limit=300)
    other = kills.differing(case, sound)
    wrong = f"exit code {first.code} ({first.last_line}), other {', '.join(other[:4])}"
    yield "the first run, afterwards", wrong if first.code != sound.code or other else ""

    # A lock that outlives its owner would keep everybody out for ever.
    kills.clear(case)
    trial.run(RUN, case.root, kills.WritePoints(case.root / "out", kills.at(int(0.6 * sound.points))).install)
    again = kills.run(case)
    yield (
        "a run after one that was killed",
        "" if again.code == sound.code else f"exit code {again.code} ({again.last_line})",
    )


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
