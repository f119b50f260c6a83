"""A small model, recipe, data and finished run in one folder; trials edit a copy of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.helpers import small_run

NAME = small_run.NAME
LOOSE = {
    "kl_remaining": 100.0, "top1": 0.01, "effect_retained": 1e-9, "effect_retained_low": 1e-9, "control_kl_margin": 99.0,
    "repetition_margin": 1.0, "score_margin": 1.0, "effect_margin": 1.0,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "compile.backends": ["bias", "closed_form", "distill"],
    "compile.distill": {"prompts": 4, "epochs": 2, "block_steps": 4, "save_every": 1},
    "verify.forms": ["merged-fp32"],
    "verify.capability": 0,
    "verify.long": 0,
    "verify.prompts_per_set": 1,
    "verify.free_tokens": 4,
    "verify.gates": LOOSE,
}
RUN = ("run", "recipes/tide.yaml", "--out", "out", "--force")
EXTRACT = ("extract", "recipes/tide.yaml", "--out", "out")  # loads and checks all that a run does


@dataclass(frozen=True)
class Case:
    """Where everything of a trial lies; commands stand in `root`, to which all their paths are relative."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipes" / f"{NAME}.yaml"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def finished(self) -> Path:
        """The output folder of a run that has ended; `RUN` writes to another."""
        return self.root / "finished"

    @property
    def adapter(self) -> Path:
        return self.finished / "adapters" / f"{NAME}-closed_form"

    @property
    def merged(self) -> Path:
        return self.finished / "merged" / f"{NAME}-bias-fp32"

    def data(self, split: str = "train") -> Path:
        return self.root / "recipes" / "data" / f"{split}.jsonl"

    def copy(self, root: Path, finished: bool = True) -> Case:
        """Copy everything; without `finished` only what a run reads."""
        ignored = shutil.ignore_patterns() if finished else shutil.ignore_patterns("finished")
        shutil.copytree(self.root, root, ignore=ignored, symlinks=True)
        return Case(root)

    def set(self, **changes: Any) -> None:
        """Set keys of the recipe; a double underscore stands for the dot between section and key."""
        yaml = YAML()
        content = yaml.load(self.recipe.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__")
            section = content
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        with self.recipe.open("w") as file:
            yaml.dump(content, file)

    def snapshot(self, without: tuple[str, ...] = ("out", "tmp")) -> dict[str, str]:
        """The hash of every file, and every link's target, outside the folders that a command may write to."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if name.split("/", maxsplit=1)[0] not in without and (path.is_symlink() or path.is_file()):
                content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
                found[name] = hashlib.sha256(content).hexdigest()
        return found


def prepare(root: Path) -> Case:
    """Everything but the finished run."""
    small_run.prepare(root)
    case = Case(root)
    case.set(model="./model", **{key.replace(".", "__"): value for key, value in SETTINGS.items()})
    return case


@dataclass(frozen=True)
class Bad:
    """A bad input: what is edited in a copy of the case, the command, and words that the message must contain ("a|b": one of them).

    Attributes:
        finished: whether the command needs the finished run.
        late: whether it can only be found after stages whose results may stay.
    """

    name: str
    edit: Callable[[Case], object]
    words: tuple[str, ...]
    command: tuple[str, ...] = EXTRACT
    finished: bool = False
    late: bool = False
