"""Measure the seeds again and put them into docs/SEEDS.md; what is not named stays as it was measured before.

python -m benchmarks.seeds [a b c d e]
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.record import Record, machine, prose, sections
from compile_steer.common.progress import ProgressBars

NAMES = ("a", "b", "c", "d", "e")
RECORD = Record[None]("SEEDS", "The five seeds, at our scale", "python -m benchmarks.seeds")


def checklist(name: str) -> list[str]:
    """What the authors of a seed do, item by item: shown where, or not done and why."""
    return ["The authors' checklist:", "", sections(Path(__file__).with_name("checklist.md"))[name.upper()]]


def main() -> None:
    """Measure the named sections, or all; the page is written after each."""
    console = Console(width=160)
    for name in sys.argv[1:] or NAMES:
        seed = import_module(f"benchmarks.seeds.{name}")
        measured = [f"Measured {machine()}", "", *seed.section(ProgressBars(console)), "", *checklist(name)]
        console.print(RECORD.save_section(seed.HEADING, measured, [prose("seeds: introduction"), ""]), markup=False)


if __name__ == "__main__":
    main()
