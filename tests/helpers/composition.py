"""Recipes with tiny runs on disk, for the tests of several programs at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import write_patch
from compile_steer.lowering.closed_form import Stage
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.recipe import read_recipe
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program
from compile_steer.tools.compose import CompositionRun
from tests.contract.test_adapters import origin
from tests.helpers.fitting import solve

NAMES = ("high.tide", "still")  # PEFT takes no dot in an adapter's name
SETTINGS = {
    "compile": {"calibration": {"prompts": 24, "max_new_tokens": 8}},
    "verify": {"heldout": 8, "pairs": 8, "max_new_tokens": 8},
}


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


def write_recipe(root: Path, name: str, model: str, start: int) -> Path:
    """A recipe whose data are words; recipes with the same `start` share all of it."""
    folder = root / f"data-{start}"
    folder.mkdir(parents=True, exist_ok=True)
    for at, split in enumerate(("train", "validation", "test", "neutral", "heldout", "calibration")):
        seeds = range(start + 1000 * at, start + 1000 * at + (30 if split == "calibration" else 10))
        rows: list[dict[str, str]] = [{"prompt": words(seed, 5)} for seed in seeds]
        if split in ("train", "validation", "test"):
            rows = [
                row | {"positive": words(seed + 300, 7), "negative": words(seed + 600, 6)}
                for row, seed in zip(rows, seeds, strict=True)
            ]
        if split == "neutral":
            rows = [row | {"response": words(seed + 300, 6)} for row, seed in zip(rows, seeds, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = ("train", "validation", "test", "neutral", "heldout", "calibration")
    content = {
        "name": name,
        "model": model,
        "data": {split: f"data-{start}/{split}.jsonl" for split in splits},
        "validate": {"score": {"kind": "lowercase"}},
        **SETTINGS,
    }
    path = root / f"{name}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return path


@dataclass
class CompositionCase:
    """A tiny llama on disk, and recipes with runs made for it."""

    root: Path
    base: LoadedModel

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def program(self, *interventions: Intervention) -> Program:
        return Program(interventions, self.base.id, self.base.revision)

    def run(self, name: str, steering: Program, patch: WeightPatch | None, start: int = 0, **changes: Any) -> Path:
        """A recipe with its program, and its adapter if there is a patch; `changes` are the adapter's provenance's."""
        paths = RunPaths(self.runs / name, name)
        steering.save(paths.program)
        if patch is not None:
            provenance = replace(origin(self.base), name=name, program_sha256=sha256(paths.program), **changes)
            write_patch(paths.adapter("closed_form"), patch, self.base, provenance, steering.describe())
        return write_recipe(self.root, name, self.base.source, start)

    def compiled(self, name: str, steering: Program, start: int = 0) -> Path:
        stages = [Stage(one.site.layer, "mlp", 4) for one in steering.interventions]
        fit = solve(self.base, canonical(steering), stages)
        return self.run(name, steering, fit, start)

    def open(self, *recipes: Path, scales: tuple[float, ...] = (), backend: str = "closed_form") -> CompositionRun:
        read = [read_recipe(path) for path in recipes]
        return CompositionRun.open(read, scales, backend, self.runs, self.root / "out", Progress())


def co_loaded(one: LoadedModel, folders: list[Path], scales: tuple[float, ...]) -> torch.nn.Module:
    """What a user of PEFT would write, without any code of ours."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
        for n, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"a{n}")
    model.base_model.set_adapter([f"a{n}" for n in range(len(folders))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for n, scale in enumerate(scales):
                module.set_scale(f"a{n}", scale)
    result: torch.nn.Module = model.eval()
    return result
