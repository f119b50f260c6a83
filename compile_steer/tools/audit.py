"""What a checkpoint, adapter or patch changed of its base: tensors, settings, and the direction that explains it all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError, LayoutError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import PATCH_FILE, read_patch
from compile_steer.formats.lora import ADAPTER_CONFIG
from compile_steer.models.checked import require_plain
from compile_steer.models.libraries import quiet_library_errors, read_config
from compile_steer.models.source import folder_of
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Program
from compile_steer.tools.audit_tensors import (
    Difference,
    TensorChange,
    TensorNames,
    Unchanged,
    compare_checkpoints,
    compare_patch,
)
from compile_steer.tools.task_vector import vector_at

# Two directions are the same from this cosine on; rounding to bf16 leaves 0.999 and more.
_SAME_DIRECTION = 0.99
# The fraction of a matrix's change that an ablation may leave unexplained, by the same measure.
_UNEXPLAINED = 0.05
# A new bias this small beside the largest change is the zero that a config flag brings along.
_ZERO = 1e-6
_SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
# What the library writes about itself, or what every tensor's own type says.
_IGNORED_SETTINGS = frozenset(
    {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "chat_template", "is_local", "local_files_only"}
)
_MAX_LENGTH = 200  # characters of a setting that are shown


@dataclass(frozen=True)
class SettingsChange:
    """One key of one file; None where a side lacks it."""

    file: str
    key: str
    base: str | None
    other: str | None


@dataclass(frozen=True)
class BakedDirection:
    """One direction in the weights.

    added: the output projection `tensors` of `block` adds a constant of norm `norm`. ablated: all `tensors` write
    `coefficient` of the direction less (1: nothing of it is left). written: one projection got a rank-1 edit of that norm.
    `cosine` is with the nearest vector of the known program, without sign where the sign is not determined.
    """

    kind: Literal["added", "ablated", "written"]
    tensors: list[str]
    block: int | None
    norm: float
    coefficient: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Audit:
    """What `other` changed. `kind` is checkpoint, adapter or patch; `baked` are the directions that explain all of the
    change, and `not_baked` says why there are none."""

    base: str
    other: str
    kind: str
    threshold: float
    n_tensors: int
    n_same: int
    recast: dict[str, int]
    changes: list[TensorChange]
    settings: list[SettingsChange]
    baked: list[BakedDirection]
    not_baked: str


def audit(base: str, other: str, program: Program | None, threshold: float, progress: Progress) -> Audit:
    """Compare `other` (a model folder, hub id, adapter or patch folder) with `base`, without loading a model.

    Args:
        program: a baked direction is compared with its vectors, if one is known.
        threshold: of the rank, as a fraction of the largest singular value.

    Raises:
        RecipeError: a model is not there. ArtifactError: a folder is none of these, is damaged, or no plain LoRA.
    """
    if not 0 < threshold < 1:
        raise RecipeError(f"--threshold {threshold:g}: needed: a fraction between 0 and 1.")
    # An adapter's folder is no model, so `folder_of` would not find it.
    base_folder, folder = folder_of(base), Path(other) if Path(other).is_dir() else folder_of(other)
    before, unchanged = Checkpoint(base_folder), Unchanged()
    # In this order: an adapter's folder may also hold the config of its base.
    kinds = {PATCH_FILE: "patch", ADAPTER_CONFIG: "adapter", "config.json": "checkpoint"}
    kind = next((kind for file, kind in kinds.items() if (folder / file).is_file()), None)
    if kind is None:
        raise ArtifactError(
            f"{folder} is no model (config.json), no adapter ({ADAPTER_CONFIG}) and no patch ({PATCH_FILE})."
        )
    for checkpoint in [base_folder, folder] if kind == "checkpoint" else [base_folder]:
        require_plain(checkpoint)
    patch = None if kind == "checkpoint" else read_patch(folder)
    layout, no_layout = _layout(base_folder if patch is not None else folder)
    names = TensorNames(layout)
    total = len(Checkpoint(folder).files) if patch is None else len(patch.low_rank) + len(patch.dense)
    with progress.phase("comparing tensors", total) as advance:
        if patch is None:
            compared = compare_checkpoints(before, Checkpoint(folder), names, threshold, unchanged, advance)
        else:
            compared = compare_patch(before, patch, names, threshold, advance)
        differences = list(compared)
    baked, reason = ([], no_layout) if layout is None else find_baked(differences, layout, program)
    return Audit(
        base=base,
        other=other,
        kind=kind,
        threshold=threshold,
        n_tensors=unchanged.compared or len(differences),
        n_same=unchanged.same,
        recast=dict(unchanged.recast),
        changes=[_with_cosine(difference, layout, program) for difference in differences],
        settings=list(settings_changes(base_folder, folder)) if patch is None else [],
        baked=baked,
        not_baked=reason,
    )


def _layout(folder: Path) -> tuple[Layout | None, str]:
    """What writes the stream of the model in a folder; None where it has no stream, and the reason."""
    # Measured on random weights: the folder's own may be what is looked into.
    with quiet_library_errors(lambda reason: ArtifactError(f"{folder} is no model of transformers ({reason}).")):
        config = read_config(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    try:
        return Layout.of(model), ""
    except LayoutError as error:
        return None, str(error)


def _with_cosine(difference: Difference, layout: Layout | None, program: Program | None) -> TensorChange:
    """The change, with the cosine of what an output projection writes most and the known vector."""
    change, top = difference.change, difference.top
    if layout is None or program is None or top is None or difference.module not in layout.output_projections:
        return change
    vector = vector_at(program, layout.output_projections[difference.module].layer)
    if vector is None or vector.shape != top.u.shape:
        return change
    return replace(change, cosine=abs(float(torch.cosine_similarity(top.u, vector, dim=0))))


def find_baked(
    differences: Sequence[Difference], layout: Layout, program: Program | None
) -> tuple[list[BakedDirection], str]:
    """The directions that explain the whole change, or the reason why none do.

    A direction leaves one of three traces: biases of output projections (it is added), one common direction removed from all
    that they write (it is ablated), or rank-1 edits of some (it is written, as the input says). With any other change beside
    these, nothing is reported.
    """
    largest = max((difference.change.norm for difference in differences), default=0.0)
    real = [difference for difference in differences if difference.change.norm > _ZERO * largest]
    projections, embeddings = layout.output_projections, layout.embeddings
    outside = [d.change.name for d in real if d.module not in projections and d.module not in embeddings]
    added = [(d, d.vector) for d in real if d.vector is not None]
    wide = [d.change for d in real if d.change.rank != 1]
    reason = ""
    if not real:
        reason = "no weight was changed"
    elif outside:
        reason = f"{len(outside)} of {len(real)} changed tensors write nothing to the stream, as {outside[0]}"
    elif wide and len(added) < len(real):
        reason = f"{len(wide)} of {len(real)} changes have another rank than 1, as {wide[0].name} ({wide[0].rank})"
    if reason:
        return [], reason

    def baked(kind: Literal["added", "written"], difference: Difference, direction: Tensor) -> BakedDirection:
        block = projections[difference.module].layer if difference.module in projections else None
        cosine = _nearest_cosine(direction, program, block, signed=kind == "added")
        return BakedDirection(kind, [difference.change.name], block, difference.change.norm, cosine=cosine)

    if len(added) == len(real):
        return [baked("added", difference, vector) for difference, vector in added], ""
    # The side of the matrix that the stream sees: an embedding's rows, what any other matrix writes.
    directions = [d.top.v if d.module in embeddings else d.top.u for d in real if d.top is not None]
    coefficient = _ablation(real, directions, embeddings)
    if coefficient is None:
        return [baked("written", *pair) for pair in zip(real, directions, strict=True)], ""
    norm = sum(d.change.norm**2 for d in real) ** 0.5
    cosine = _nearest_cosine(directions[0], program, None, signed=False)  # a singular vector has no sign
    return [BakedDirection("ablated", [d.change.name for d in real], None, norm, coefficient, cosine)], ""


def _ablation(real: Sequence[Difference], directions: Sequence[Tensor], embeddings: Sequence[str]) -> float | None:
    """c, if one direction u explains every matrix by W_new = (I - c u u^T) W; else None."""
    if any(abs(float(torch.dot(directions[0], other))) < _SAME_DIRECTION for other in directions):
        return None
    coefficients = []
    for difference in real:
        top, embedding = difference.top, difference.module in embeddings
        along = None if top is None else top.written if embedding else top.read
        if top is None or along is None:
            return None
        removed = top.s * (top.u if embedding else top.v)  # the change is u removed^T
        coefficient = -float(torch.dot(removed, along) / along.square().sum())
        if float((removed + coefficient * along).norm() / removed.norm()) > _UNEXPLAINED:
            return None
        coefficients.append(coefficient)
    return sum(coefficients) / len(coefficients)


def _nearest_cosine(direction: Tensor, program: Program | None, block: int | None, signed: bool) -> float | None:
    """The largest cosine with a vector of the program at that block (None: at any)."""
    cosines = []
    for intervention in () if program is None else program.active:
        # Only an added vector has the sign of its coefficient.
        vector = (intervention.coefficient if intervention.operation == "add" else 1.0) * intervention.vector.float()
        if block in (None, intervention.site.changes_from) and vector.shape == direction.shape:
            cosines.append(float(torch.cosine_similarity(direction.float(), vector, dim=0)))
    nearest = max(cosines, key=abs, default=None)
    return nearest if nearest is None or signed else abs(nearest)


def settings_changes(base: Path, other: Path) -> Iterator[SettingsChange]:
    """Every setting that differs, for the files that `other` has; raises `ArtifactError` for a file that is no JSON object."""
    for name in (*_SETTINGS_FILES, "tokenizer.json"):
        if (other / name).is_file():  # what it lacks, its users take from the base
            before, after = (_read(folder / name) for folder in (base, other))
            for key in sorted((before.keys() | after.keys()) - _IGNORED_SETTINGS):
                old, new = before.get(key), after.get(key)
                if old != new:
                    is_vocabulary = (name, key) == ("tokenizer.json", "model") and old and new
                    shorten = _vocabularies if is_vocabulary else _shortened  # a vocabulary would fill the screen
                    yield SettingsChange(name, key, *shorten(old, new))
    if (other / "tokenizer_config.json").is_file():
        templates = _template(base), _template(other)
        if templates[0] != templates[1]:
            yield SettingsChange("chat template", "", *_shortened(*templates))


def _vocabularies(base: Any, other: Any) -> Iterator[str]:
    """How many tokens each tokenizer model has, and how many differ."""
    before, after = _tokens(base.get("vocab")), _tokens(other.get("vocab"))
    moved = sum(before.get(token) != number for token, number in after.items())
    gone = len(before.keys() - after.keys())
    yield f"{len(before)} tokens"
    yield f"{len(after)} tokens, of which {moved} are new or have another number; {gone} are gone"


def _tokens(vocab: Any) -> dict[str, Any]:
    """Token -> number; where a tokenizer keeps a list of (token, score), token -> (place, score)."""
    listed = enumerate(vocab or ())
    return vocab if isinstance(vocab, dict) else {str(entry[0]): (place, entry[1]) for place, entry in listed}


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    return None if template is None else str(template).strip()


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "Get or make it again.") if path.is_file() else {}


def _shortened(*values: Any) -> Iterator[str | None]:
    for value in values:
        text = value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False, sort_keys=True)
        too_long = text is not None and len(text) > _MAX_LENGTH
        yield f"{text[:_MAX_LENGTH]} ... ({len(text)} characters)" if text and too_long else text
