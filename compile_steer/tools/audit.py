"""The audit as a whole: find both sides, compare what they hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError, LayoutError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import PATCH_FILE, read_patch
from compile_steer.formats.lora import ADAPTER_CONFIG, read_lora
from compile_steer.models.load import folder_of, quiet
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.audit_baked import Baked, find_baked
from compile_steer.tools.audit_settings import SettingsChange, settings_changes
from compile_steer.tools.audit_tensors import Difference, Names, Tally, TensorChange, of_checkpoints, of_patch
from compile_steer.tools.task_vector import vector_at

THRESHOLD = 0.01
"""Singular values above this share of the largest count as rank, if no other share is asked for."""


@dataclass(frozen=True)
class Audit:
    """What `other` changed: `kind` is a checkpoint, an adapter or a patch of ours. `baked` are the directions that explain
    all of it; where there are none, `not_baked` is why."""

    base: str
    other: str
    kind: str
    threshold: float
    n_tensors: int
    n_same: int
    recast: dict[str, int]
    changes: list[TensorChange]
    settings: list[SettingsChange]
    baked: list[Baked]
    not_baked: str

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return asdict(self)


def audit(base: str, other: str, program: Program | None, threshold: float, progress: Progress) -> Audit:
    """Compare `other` (a model folder, hub id, adapter or patch folder) with `base`; no model is loaded.

    Args:
        program: whose vectors a baked direction is held against, if one is known.
        threshold: of the rank, as a share of the largest singular value.

    Raises:
        RecipeError: a model is not there. ArtifactError: a folder is neither, is damaged, or no plain LoRA.
    """
    if not 0 < threshold < 1:
        raise RecipeError(f"--threshold {threshold:g}: needed: a share between 0 and 1.")
    base_folder, folder = folder_of(base), Path(other) if Path(other).is_dir() else folder_of(other)
    before, tally = Checkpoint(base_folder), Tally()
    patch = _patch(folder)
    layout = _layout(base_folder if patch is not None else folder)
    names = Names(layout)
    total = len(Checkpoint(folder).files) if patch is None else len(patch.low_rank) + len(patch.dense)
    with progress.phase("comparing tensors", total) as advance:
        if patch is None:
            found = of_checkpoints(before, Checkpoint(folder), names, threshold, tally, advance)
        else:
            found = of_patch(before, patch, names, threshold, advance)
        differences = list(found)
    baked, why = find_baked(differences, layout, program)
    return Audit(
        base=base,
        other=other,
        kind="checkpoint" if patch is None else "patch" if (folder / PATCH_FILE).is_file() else "adapter",
        threshold=threshold,
        n_tensors=tally.looked or len(differences),
        n_same=tally.same,
        recast=tally.recast,
        changes=[_told(one, layout, program) for one in differences],
        settings=settings_changes(base_folder, folder) if patch is None else [],
        baked=baked,
        not_baked=why,
    )


def _told(one: Difference, layout: Layout | None, program: Program | None) -> TensorChange:
    """The change with the known vector beside what a writer writes most."""
    if layout is None or program is None or one.top is None or one.module not in layout.output_projections:
        return one.change
    vector = vector_at(program, layout.output_projections[one.module].layer)
    if vector is None or vector.shape != one.top.u.shape:
        return one.change
    return replace(one.change, cosine=abs(float(torch.cosine_similarity(one.top.u, vector, dim=0))))


def _layout(folder: Path) -> Layout | None:
    """The model's modules by name, without its weights; None for a family that is not known."""
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return Layout.of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    except LayoutError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder} is no model of transformers ({str(error).splitlines()[0]}).") from error


def _patch(folder: Path) -> WeightPatch | None:
    """What an adapter or a patch adds; None where the folder holds a whole model; raises `ArtifactError`."""
    if (folder / PATCH_FILE).is_file():
        return read_patch(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return WeightPatch(read_lora(folder).edits)
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} is no model (config.json), no adapter ({ADAPTER_CONFIG}) and no patch ({PATCH_FILE})."
        )
    return None
