"""Many small runs in one process: memory, open files, threads and temporary files must stay as they are."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.campaign import trial
from benchmarks.campaign.case import NAME, Case
from compile_steer import __main__ as entry

RECIPE = f"recipes/{NAME}.yaml"
QUICK = ("--set", "compile.backends=[bias,closed_form]", "--set", "verify.forms=[merged-fp32]")
COMMANDS = (("validate",), ("compile", "--force"), ("merge",), ("verify",))
MEMORY = 8 * 2**20  # bytes; allocators do not give everything back at once


def measured(case: Case, runs: int) -> list[dict[str, int]]:
    """Memory, files, threads and temporary files after each of so many runs in one process."""
    found = case.root / "soak.jsonl"

    def repeat() -> None:
        with found.open("w", buffering=1) as file:
            for number in range(runs):
                for command in COMMANDS:
                    sys.argv = [
                        "compile-steer",
                        command[0],
                        RECIPE,
                        "--out",
                        "out",
                        "--seed",
                        str(number),
                        *command[1:],
                        *QUICK,
                    ]
                    try:
                        entry.main()
                    except SystemExit as stopped:
                        if stopped.code not in (0, 1):
                            raise
                shutil.rmtree("out")
                file.write(json.dumps(_state()) + "\n")
        os._exit(0)

    outcome = trial.run((), case.root, repeat, limit=6000)
    states = [json.loads(line) for line in found.read_text().splitlines()]
    if outcome.code != 0:
        raise RuntimeError(f"run {len(states)} of the soak ended with {outcome.code}: {outcome.errors[-2000:]}")
    return states


def _state() -> dict[str, int]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory": resident,
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
        "temporary files": sum(1 for _ in Path("tmp").rglob("*")),
    }


def growth(states: Sequence[dict[str, int]]) -> dict[str, str]:
    """What grew between the second and the last tenth of the runs, in words; nothing where all stayed flat."""
    tenth = max(len(states) // 10, 1)
    early, late = states[tenth : 2 * tenth], states[-tenth:]
    grown = {}
    for name in early[0]:
        before, after = (median(state[name] for state in part) for part in (early, late))
        allowed = MEMORY if name == "memory" else 0
        if after > before + allowed:
            grown[name] = f"{before:,.0f} to {after:,.0f} in {len(states)} runs"
    return grown
