"""Verdicts of every kind, as the command line prints them for the ocean recipe on the embedded model.

    python -m benchmarks.verdicts

Writes docs/VERDICTS.md, in about seven minutes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import ROOT, Record, formatted, prose

RECIPE = "recipes/ocean.yaml"
# By heading: what is asked for beside the recipe.
VERDICTS = {
    "Pass, with its price": [],
    "Inconclusive": ["validate.prompts=8", "validate.layers=[14]", "validate.coefficients=[1]"],
    "Fail": ["validate.layers=[10]", "validate.coefficients=[-1.5]"],
    "Fail, for its price": [
        "validate.layers=[10]",
        "validate.coefficients=[3.5]",
        "validate.max_perplexity_ratio=2.5",
        "validate.tolerances={}",
    ],
}
RECORD = Record[None]("VERDICTS", "Four verdicts", "python -m benchmarks.verdicts")


def validate(settings: Sequence[str], out: Path) -> tuple[str, str]:
    """(the command, what it prints to somebody who does not watch)."""
    arguments = ["validate", RECIPE, "--verbose", *(part for setting in settings for part in ("--set", setting))]
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compile_steer", *arguments, "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # The verdict is the exit code too: 0 and 1.
    if done.returncode > 1:
        raise RuntimeError(done.stderr)
    return shlex.join(["compile-steer", *arguments]), done.stdout.strip()


def main() -> None:
    """Run every command and write the page."""
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (heading, settings) in enumerate(VERDICTS.items()):
            command, printed = validate(settings, Path(folder) / str(number))
            parts[heading] = "\n\n".join([prose(f"verdicts: {heading}"), f"    {command}", f"```\n{printed}\n```"])
            print(printed, flush=True)
    RECORD.save(prose("verdicts: introduction"), "", *formatted(parts))


if __name__ == "__main__":
    main()
