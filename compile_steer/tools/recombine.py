"""Recombine: patches on disk of one base -> their scaled sum, cut to a rank, as a new patch with its own origin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.export.adapter import is_adapter, read_patch, write_patch
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.load import LoadedModel
from compile_steer.report.card import model_card
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.task_vector import MatrixReport, look_into


@dataclass(frozen=True)
class Recombination:
    """factor x the patch in `artifact` + the patches in `others`, cut to `rank` (None: not cut), kept as `name`."""

    artifact: Path
    factor: float
    others: tuple[Path, ...]
    rank: int | None
    name: str

    def describe(self) -> str:
        """In words."""
        parts = [f"{self.factor:g} x {self.artifact.name}", *(folder.name for folder in self.others)]
        return " + ".join(parts) + (f", cut to rank {self.rank}" if self.rank else "")


@dataclass(frozen=True)
class Recombined:
    """The folder that was written, and what its matrices hold."""

    folder: Path
    form: str
    matrices: list[MatrixReport]

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON."""
        matrices = [asdict(matrix) for matrix in self.matrices]
        return {"folder": str(self.folder), "form": self.form, "matrices": matrices}


def recombine(wanted: Recombination, loaded: LoadedModel, paths: RunPaths, program: Program | None) -> Recombined:
    """Write the new patch to `paths.adapter(wanted.name)`.

    Args:
        program: whose vectors the report compares with, if it is known.

    Raises:
        ArtifactError: a folder holds no patch, or of another base than `loaded`; the factor, rank or name is no good.
    """
    folder = paths.adapter(wanted.name)
    problems = _problems(wanted, folder)
    patches: list[WeightPatch] = []
    origins: list[Provenance] = []
    for one in (wanted.artifact, *wanted.others):
        try:
            origin = Provenance.read_unedited(one)
            problems += origin.base_mismatch(one, loaded.id, loaded.revision)
            patches.append(read_patch(one))
            origins.append(origin)
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    patch = wanted.factor * patches[0]
    for other in patches[1:]:
        patch = patch + other
    if wanted.rank is not None:
        patch = patch.truncated(wanted.rank, loaded.layout)
    form = "adapter" if is_adapter(patch, loaded) else "patch"
    origin = replace(_origin(wanted, origins, form, paths.name), biases=len(patch.bias))
    write_patch(folder, patch, loaded, origin, model_card(origin, None))
    return Recombined(folder, form, look_into(patch, loaded.layout, program))


def _problems(wanted: Recombination, folder: Path) -> list[str]:
    problems = []
    if not math.isfinite(wanted.factor) or wanted.factor == 0.0:
        problems.append(f"the factor is {wanted.factor:g}; needed: a finite number other than 0.")
    if wanted.rank is not None and wanted.rank < 1:
        problems.append(f"the rank to cut to is {wanted.rank}; needed: 1 or more.")
    if Path(wanted.name).name != wanted.name or wanted.name in BACKENDS:
        problems.append(
            f"'{wanted.name}' cannot be the new name: a word without slashes that is no backend's is needed."
        )
    if folder.resolve() in [one.resolve() for one in (wanted.artifact, *wanted.others)]:
        problems.append(f"{folder} is read from and would be replaced; give another name.")
    return problems


def _origin(wanted: Recombination, origins: Sequence[Provenance], form: str, name: str) -> Provenance:
    """The first patch's origin, without the claims that hold no longer: nothing validated this combination."""
    parents = [artifact_sha256(folder) for folder in (wanted.artifact, *wanted.others)]
    forced = any(origin.forced or origin.verdict != "pass" for origin in origins)
    return replace(
        origins[0],
        name=name,
        backend=wanted.name,
        form=form,
        validation_sha256="",
        verdict="none",
        forced=forced,
        seconds=0.0,
        inputs=digest([parents, wanted.factor, wanted.rank]),
        parent=" ".join(parents),
        recombined=wanted.describe(),
        described=wanted.describe(),
    )
