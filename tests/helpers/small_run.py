"""A whole run on a tiny llama: its recipe, model and data in one folder, as a user has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.progress import Progress
from compile_steer.pipeline.artifacts import compile_program, merge, verify
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe, read_recipe
from tests.helpers.tiny import build, chat_tokenizer

NAME = "tide"
SPLITS = {"train": 12, "validation": 8, "test": 8, "neutral": 8, "heldout": 8, "calibration": 24, "other_behaviour": 8}
SETTINGS: dict[str, Any] = {
    "ask": "w7 w8",
    "validate": {
        "score": {"kind": "keywords", "patterns": [r"\bw[89]\d"]},
        "layers": [1],
        "coefficients": [2.5],
        "sweep_pairs": 4,
        "sweep_neutral": 4,
        "sweep_prompts": 4,
        "control_pairs": 4,
        "prompts": 8,
        "few_shot": 0,
        "other_behaviour": "data/other_behaviour.jsonl",
        "dose_prompts": 2,
        "max_new_tokens": 4,
    },
    # Linear edits, fitted to so few texts that the adapter misses the gate of the KL.
    "compile": {"dial": True, "backends": ["bias", "closed_form"], "calibration": {"prompts": 20, "max_new_tokens": 8}},
    "verify": {
        "forms": ["adapter", "merged-fp32"],
        "heldout": 8,
        "pairs": 8,
        "neutral": 8,
        "prompts": 8,
        "max_new_tokens": 4,
        "capability": 2,
    },
}


def words(seed: int, count: int, start: int = 6, stop: int = 97) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{n}" for n in torch.randint(start, stop, (count,), generator=generator))


@dataclass(frozen=True)
class SmallRun:
    """Where everything of it lies."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipes" / f"{NAME}.yaml"

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.root / "runs" / NAME, NAME)

    def read(self) -> Recipe:
        return read_recipe(self.recipe)

    def open(self) -> Run:
        return Run.open(self.read(), self.paths.out, Progress())


def prepare(root: Path) -> SmallRun:
    """The model, the data and the recipe; nothing has run yet."""
    model = root / "model"
    build("llama", seed=3).save_pretrained(model)
    chat_tokenizer().save_pretrained(model)
    data = root / "recipes" / "data"
    data.mkdir(parents=True)
    seed = 0
    for split, count in SPLITS.items():
        rows = []
        for _ in range(count):
            seed += 1
            row = {"prompt": words(seed, 4)}
            if split in ("train", "validation", "test", "other_behaviour"):
                row |= {"positive": words(seed + 500, 6, start=70), "negative": words(seed + 900, 6, stop=79)}
            elif split == "neutral":
                row |= {"response": words(seed + 500, 6)}
            rows.append(json.dumps(row))
        (data / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    files = {split: f"data/{split}.jsonl" for split in SPLITS if split != "other_behaviour"}
    content = {"name": NAME, "model": str(model), "seed": 5, "device": "cpu", "data": files, **SETTINGS}
    run = SmallRun(root)
    with run.recipe.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return run


def complete_run(root: Path) -> SmallRun:
    """Every stage; a tiny random model may fail its validation, so the compile is forced."""
    run = prepare(root)
    opened = run.open()
    opened.validate()
    compile_program(opened, force=True)
    merge(opened)
    paths = run.paths
    verify(opened, [paths.adapter("closed_form"), paths.merged("bias", "fp32")])
    return run
