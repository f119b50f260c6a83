"""Where a run's artifacts lie below its output folder."""

from __future__ import annotations

import os
from pathlib import Path

from compile_steer.common.errors import ArtifactError, brief


def real_path(path: Path) -> Path:
    """The absolute path without links and `..`. A link that leads to itself stays; Path.resolve raises RuntimeError for it."""
    return Path(os.path.realpath(path))


def home_path(path: str) -> Path:
    """The path with a leading `~` replaced. That of a user who is not known stays; Path.expanduser raises RuntimeError for it."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (as said)


def require_inside(folder: Path, recorded: Path, key: str, consent: str = "name a folder above it (--recipes)") -> None:
    """Raise `ArtifactError` where a path that an artifact records leads out of `folder`, by `..`, from the root or by a link."""
    target = real_path(folder / recorded)
    if not target.is_relative_to(real_path(folder)):
        raise ArtifactError(
            f"{key}: the artifact records {brief(str(recorded))}, which lies outside of {folder}. It is not read, unless you "
            f"{consent}."
        )


def _plain_name(name: str) -> str:
    """`name` where it is that of one file or folder; raises `ArtifactError` for one that leads elsewhere."""
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ArtifactError(f"the artifact records the name {brief(name)}, which would lead out of its run's folder.")
    return name


class RunPaths:
    """`data/NAME.*`, `vectors/NAME.*`, `adapters/NAME-BACKEND/`, `merged/NAME-BACKEND-PRECISION/` below `out`.

    For several programs NAME is all their names, joined by '+'; their compositions lie in `composed/`.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name = out, _plain_name(name)
        self.generation_report = out / "data" / f"{name}.json"  # how many pairs were generated, and why others dropped
        self.directions = out / "vectors" / f"{name}.directions.safetensors"  # the candidates, and their controls
        self.program = out / "vectors" / f"{name}.safetensors"  # the chosen one: the vector
        self.validation = out / "vectors" / f"{name}.validation.json"
        self.prompts = out / "vectors" / f"{name}.prompts.jsonl"  # the result of every test pair and prompt
        self.decompiled = out / "vectors" / f"{name}.decompiled.safetensors"  # read off an artifact; report: .json
        self.report = out / f"{name}.html"  # the whole run as one self-contained page
        self.work = out / "work" / name  # the backends' intermediate state, removed when all are done

    @staticmethod
    def of_artifact(path: Path, name: str) -> RunPaths:
        """The paths of the run that left the artifact at `path`, two folders below its output folder."""
        return RunPaths(real_path(path).parent.parent, name)

    def pairs(self, split: str) -> Path:
        """The pairs of a split that the model generated, as JSONL."""
        return self.out / "data" / f"{self.name}.{split}.jsonl"

    def adapter(self, backend: str) -> Path:
        return self.out / "adapters" / _plain_name(f"{self.name}-{backend}")

    def merged(self, backend: str, precision: str) -> Path:
        return self.out / "merged" / _plain_name(f"{self.name}-{backend}-{precision}")

    def place(self, backend: str, form: str) -> Path:
        """Where a run leaves the artifact of that backend and form."""
        return (
            self.adapter(backend)
            if form in ("adapter", "patch")
            else self.merged(backend, form.removeprefix("merged-"))
        )

    def composed(self, suffix: str) -> Path:
        """An adapter made of several (suffix BACKEND-stacked or BACKEND-joint), or a report on how they interfere."""
        return self.out / "composed" / _plain_name(f"{self.name}-{suffix}")
