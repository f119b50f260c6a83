"""One small walk of the real command line on the real model, shared by the tests that look at what it left."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from compile_steer.places import Places
from compile_steer.progress import Meter
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.run import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ocean.yaml"

# The ocean recipe with fewer texts; what is computed, and every gate, is the same.
SMALL = [
    "validate.layers=[10]",
    "validate.coefficients=[2.5]",
    "validate.sweep_pairs=4",
    "validate.sweep_prompts=4",
    "validate.sweep_neutral=4",
    "validate.control_pairs=8",
    "validate.dose_prompts=2",
    "validate.few_shot=0",
    "validate.prompts=16",
    "validate.max_new_tokens=20",
    "compile.calibration.prompts=72",
    "compile.calibration.max_new_tokens=24",
    "compile.distill.prompts=8",
    "compile.distill.block_steps=60",
    "verify.heldout=8",
    "verify.pairs=8",
    "verify.neutral=8",
    "verify.prompts=8",
    "verify.max_new_tokens=20",
    "verify.kinds=1",
    "verify.free_tokens=4",
    "verify.capability=8",
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
    def places(self) -> Places:
        return Places(self.out, "ocean")


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    out = tmp_path_factory.mktemp("walk")
    done = subprocess.run(command("run", RECIPE, "--out", out), capture_output=True, text=True, cwd=ROOT, check=False)
    return Walk(out, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return read_recipe(RECIPE, SMALL)


@pytest.fixture(scope="session")
def opened(walk: Walk, recipe: Recipe) -> Run:
    """The walk's run, open in this process."""
    return Run.open(recipe, walk.out, Meter())
