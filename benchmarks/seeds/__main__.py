"""Measure the seeds again and put them into docs/SEEDS.md; what is not named stays as it was measured before.

python -m benchmarks.seeds [a b c d e]
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from benchmarks.record import Record, machine
from compile_steer.common.progress import ProgressBars

NAMES = ("a", "b", "c", "d", "e")
RECORD = Record[None]("SEEDS", "The five seeds, at our scale", "python -m benchmarks.seeds")
INTRODUCTION = (
    "Each of the systems that this project was made from, run as its authors run it, with its checklist and its baselines, on "
    "SmolLM2-135M-Instruct; what does not show at that size is said so."
)


def checklist(name: str) -> list[str]:
    """What the authors of a seed do, item by item: shown where, or not done and why."""
    text = Path(__file__).with_name("checklist.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w)\n\n(.*?)\n*(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    return ["The authors' checklist:", "", sections[name.upper()]]


def main() -> None:
    """Measure the named sections, or all; the page is written after each."""
    console = Console(width=160)
    for name in sys.argv[1:] or NAMES:
        seed = import_module(f"benchmarks.seeds.{name}")
        measured = [f"Measured {machine()}", "", *seed.section(ProgressBars(console)), "", *checklist(name)]
        console.print(RECORD.save_section(seed.HEADING, measured, [INTRODUCTION, ""]), markup=False)


if __name__ == "__main__":
    main()
