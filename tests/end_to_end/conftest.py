"""One small walk of the real command line on the real model, shared by the tests that look at what it left.

Where several processes test side by side, the first to come walks and the others wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.progress import Progress
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ocean.yaml"

# The ocean recipe with fewer texts; what is computed, and every gate, is the same.
SMALL = [
    "extract.shuffled=6",
    "validate.layers=[10]",
    "validate.coefficients=[2.5]",
    "validate.sweep_pairs=4",
    "validate.sweep_prompts=4",
    "validate.sweep_neutral=4",
    "validate.control_pairs=6",
    "validate.dose_prompts=2",
    "validate.few_shot=0",
    "validate.pairs=16",
    "validate.prompts=24",
    "validate.max_new_tokens=20",
    "compile.calibration.prompts=72",
    "compile.calibration.max_new_tokens=32",
    "compile.distill.prompts=8",
    "compile.distill.block_steps=60",
    "verify.forms=[adapter, merged-fp32]",
    "verify.heldout=12",
    "verify.pairs=8",
    "verify.neutral=8",
    "verify.prompts=8",
    "verify.max_new_tokens=24",
    "verify.prompts_per_set=1",
    "verify.free_tokens=4",
    "verify.long_tokens=200",
    "verify.capability=4",
]


def command(*arguments: str | Path, small: bool = True) -> list[str]:
    """The command line in a process of its own."""
    sets = [part for change in SMALL for part in ("--set", change)] if small else []
    return [sys.executable, "-m", "compile_steer", *map(str, arguments), *sets]


@dataclass(frozen=True)
class Walk:
    """What `compile-steer run` returned and left."""

    out: Path
    code: int
    stdout: str
    stderr: str

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.out, "ocean")


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "walk"
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "told.json"
    with FileLock(folder / "lock"):
        if not told.is_file():
            arguments = command("run", RECIPE, "--out", folder / "out")
            done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
            told.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
    return Walk(folder / "out", *json.loads(told.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return read_recipe(RECIPE, SMALL)


@pytest.fixture(scope="session")
def opened(walk: Walk, recipe: Recipe) -> Run:
    """The walk's run, open in this process."""
    return Run.open(recipe, walk.out, Progress())
