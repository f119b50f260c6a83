"""Measure the seeds again and put them into docs/SEEDS.md; what is not named stays as it was measured before.

python -m benchmarks.seeds [a b c d e]
"""

from __future__ import annotations

import re
import sys
from importlib import import_module

from rich.console import Console

from benchmarks.record import ROOT, machine
from benchmarks.seeds.checklist import ticked
from compile_steer.artifacts.files import save_text
from compile_steer.common.progress import ProgressBars

PAGE = ROOT / "docs" / "SEEDS.md"
NAMES = ("a", "b", "c", "d", "e")


def kept() -> dict[str, str]:
    """The sections that the page has, by letter."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    parts = re.split(r"^(?=## [A-E]\. )", text, flags=re.MULTILINE)[1:]
    return {part[3].lower(): part for part in parts}


def write(found: dict[str, str]) -> None:
    """The page from its sections, each with its checklist."""
    head = [
        "# The five seeds, at our scale",
        "",
        "Written by `python -m benchmarks.seeds`; do not edit. Each of the systems that this project was made from, run as its authors "
        "run it, with its checklist and its baselines, on SmolLM2-135M-Instruct; what does not show at that size is said so.",
        "",
        "",
    ]
    save_text(PAGE, "\n".join(head) + "".join(ticked(found[one], one) for one in sorted(found)).rstrip() + "\n")


def main() -> None:
    """Measure the named sections, or all; the page is written after each."""
    console = Console(width=160)
    found = kept()
    for name in sys.argv[1:] or NAMES:
        lines = import_module(f"benchmarks.seeds.{name}").section(ProgressBars(console))
        found[name] = "\n".join([*lines[:1], "", f"Measured {machine()}", *lines[1:]]).rstrip() + "\n\n"
        write(found)
        console.print(found[name], markup=False)


if __name__ == "__main__":
    main()
