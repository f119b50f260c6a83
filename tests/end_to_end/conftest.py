"""One small run of the real command line on the real model, shared by the tests that look at what it left.

Where several processes test side by side, the first to need the run makes it and the others wait.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.progress import Progress
from compile_steer.data.section import TEXTS
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "ocean.yaml"

# The ocean recipe with fewer texts; what is computed, and every gate, is the same. 24 answered prompts are what a change
# of the score needs to be significant, and with 40 calibration prompts the closed form leaves 0.01 %; 12 texts of 24
# tokens are what a sound artifact needs to pass the gate of top-1 agreement whatever is sampled (with 8 of 16 it may not). The
# direction of 24 pairs costs more right answers than ocean's own, in answers of 16 tokens: the recipe here allows for it.
SMALL: dict[str, Any] = {
    "extract": {"shuffled": 6},
    "validate": {
        "layers": [10],
        "coefficients": [2.5],
        "sweep_pairs": 4,
        "sweep_prompts": 4,
        "sweep_neutral": 4,
        "control_pairs": 4,
        "dose_prompts": 2,
        "few_shot": 0,
        "pairs": 8,
        "prompts": 24,
        "max_new_tokens": 16,
        "questions": 8,
        "control_prompts": 4,
        "tolerances": {"answers": 0.5, "right_answers": 0.2, "instructions": 0.5},
        "wordings": 2,
    },
    "compile": {
        "backends": ["bias", "closed_form"],
        "calibration": {"prompts": 40, "max_new_tokens": 24},
    },
    "verify": {
        "forms": ["adapter", "merged-fp32"],
        "heldout": 12,
        "pairs": 8,
        "neutral": 8,
        "prompts": 8,
        "max_new_tokens": 24,
        "prompts_per_set": 1,
        "samples_per_prompt": 2,
        "free_tokens": 4,
        "long": 1,
        "long_tokens": 100,
        "capability": 2,
    },
}
ROWS = {"train": 24, "validation": 8, "test": 24, "neutral": 8, "heldout": 12, "calibration": 40}


def small_recipe(folder: Path) -> Path:
    """Write the ocean recipe with the settings above and the first rows of its data; the neutral texts are the shortest."""
    content = YAML(typ="safe").load(RECIPE)
    for section, settings in SMALL.items():
        content[section] = {**content.get(section, {}), **settings}
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, count in ROWS.items():
        # What the recipe does not name comes with the package.
        source = RECIPE.parent / content["data"][name] if name in content["data"] else TEXTS / f"{name}.jsonl"
        lines = source.read_text(encoding="utf-8").splitlines()
        chosen = sorted(lines, key=len)[:count] if name == "neutral" else lines[:count]
        content["data"][name] = f"data/{name}.jsonl"
        (folder / content["data"][name]).write_text("\n".join(chosen), encoding="utf-8")
    content["validate"]["other_behaviour"] = str(RECIPE.parent / content["validate"]["other_behaviour"])
    path = folder / "ocean.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return path


def command(*arguments: str | Path) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "compile_steer", *map(str, arguments)]


@dataclass(frozen=True)
class FinishedRun:
    """What `compile-steer run` returned and left."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def recipe(self) -> Path:
        return self.folder / "ocean.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.out, "ocean")

    def parity(self, artifact: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / artifact / "parity.json").read_text(encoding="utf-8"))
        return content


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "ocean-run"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    with FileLock(folder / "lock"):
        if not result.is_file():
            arguments = command("run", small_recipe(folder), "--out", folder / "out", "--verbose")
            done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)
            result.write_text(json.dumps([done.returncode, done.stdout, done.stderr]), encoding="utf-8")
    return FinishedRun(folder, *json.loads(result.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def opened(finished: FinishedRun) -> Run:
    """The finished run, open in this process."""
    return Run.open(read_recipe(finished.recipe), finished.out, Progress())


@pytest.fixture(scope="session")
def without_extras(opened: Run) -> Run:
    """The same, to be verified without long prompts: the other gates must do. What the run's models wrote is kept for it."""
    verify = opened.recipe.verify.model_copy(update={"long": 0})
    return Run(opened.recipe.model_copy(update={"verify": verify}), opened.paths, opened.context)
