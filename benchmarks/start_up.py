"""How long the command line takes to answer: CPU seconds of `--help` and of `show`, each in a process of its own.

    python -m benchmarks.start_up

The targets: help in 0.5 s, `show` in 1.5 s. That neither imports a heavy library is tested in tests/end_to_end/test_start_up.py.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.record import ROOT, table
from compile_steer.cli.app import app

REPEATS = 5


def cpu_seconds(arguments: Sequence[str]) -> float:
    """Processor time of one call, in seconds, user and system."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", "compile_steer", *arguments], cwd=ROOT, capture_output=True, check=False)
    return spent() - before


def main() -> None:
    """Print the median of each call."""
    calls = [["--help"], *([str(command.name), "--help"] for command in app.registered_commands)]
    calls += [["show", "adapters/ocean-closed_form"], ["show", "vectors/ocean.safetensors"]]
    rows = [(" ".join(call), f"{statistics.median(cpu_seconds(call) for _ in range(REPEATS)):.2f}") for call in calls]
    print("\n".join(table("compile-steer | CPU seconds", rows)))


if __name__ == "__main__":
    main()
