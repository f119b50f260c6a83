"""Compare an artifact with one that was made again: in its bytes, or else in its numbers.

The difference of two tensors is ||new - old|| / ||old||, that of two artifacts the largest of all their tensors. What is
compared is what an artifact does: of a vector c v, of a patch each matrix's whole change B A (its factors are not unique), of
a checkpoint what it changed of its base, of a GGUF file the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.provenance import Provenance
from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.export.adapter import read_patch
from compile_steer.export.engine_support import GGUF_FILE
from compile_steer.models.gguf import gguf_tensors
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport

State = Literal["bytes", "numbers", "differs", "not compared"]
Difference = Callable[[Path, Path], float]


@dataclass(frozen=True)
class Comparison:
    """One thing made again. `difference` is the largest relative one, where numbers were compared.

    bytes: the same bytes; numbers: other bytes, but numbers within the tolerance; differs: neither; not compared: other
    bytes, and the original is not here for its numbers.
    """

    name: str
    state: State
    difference: float | None = None
    note: str = ""


def relative_difference(old: Tensor | None, new: Tensor | None, base: Tensor | None = None) -> float:
    """||new - old|| / ||old - base||; infinite where one is missing or of another shape."""
    if old is None or new is None or old.shape != new.shape:
        return math.inf
    start = torch.zeros_like(old) if base is None or base.shape != old.shape else base
    # In fp64, so that summing adds no difference of its own.
    size = float((old.double() - start.double()).norm())
    difference = float((new.double() - old.double()).norm())
    return 0.0 if difference == 0.0 else difference / size if size > 0 else math.inf


def directions_difference(old: Path, new: Path) -> float:
    """Over every block's direction; raises `ArtifactError`."""
    before, after = Directions.load(old), Directions.load(new)
    if before.vectors.shape != after.vectors.shape or before.point != after.point:
        return math.inf
    return max(map(relative_difference, before.vectors, after.vectors), default=0.0)


def program_difference(old: Path, new: Path) -> float:
    """Over every intervention's c v and target; infinite where sites, operations or positions differ; raises `ArtifactError`."""
    before, after = Program.load(old), Program.load(new)
    if before.shape != after.shape:
        return math.inf
    differences = [0.0]
    for a, b in zip(before.interventions, after.interventions, strict=True):
        differences.append(relative_difference(a.coefficient * a.vector, b.coefficient * b.vector))
        targets = (torch.tensor([intervention.projection or 0.0]) for intervention in (a, b))
        differences.append(relative_difference(*targets))
    return max(differences)


def report_difference(old: Path, new: Path) -> float:
    """Of the effect on test pairs, relative to its size or its interval's, whichever is larger; infinite where another
    layer or verdict came out. Raises `ArtifactError`."""
    before, after = ValidationReport.load(old), ValidationReport.load(new)
    if (before.layer, before.verdict) != (after.layer, after.verdict):
        return math.inf
    size = max(abs(before.margin.value), before.margin.high - before.margin.low)
    difference = abs(before.margin.value - after.margin.value)  # of an effect near 0 the interval is the scale
    return 0.0 if difference == 0.0 else difference / size


def patch_difference(old: Path, new: Path) -> float:
    """Over every matrix and bias; raises `ArtifactError`."""
    before, after = read_patch(old), read_patch(new)
    if before.low_rank.keys() != after.low_rank.keys():
        return math.inf
    # A low-rank edit becomes a whole matrix only here, one at a time.
    edits = ((edit, after.low_rank[name]) for name, edit in before.low_rank.items())
    differences = [relative_difference(a.B @ a.A, b.B @ b.A) for a, b in edits]
    tables = (before.dense, after.dense), (before.bias, after.bias)
    return max([*differences, *(_table_difference(*pair) for pair in tables)])


def _table_difference(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """Over the tensors of two tables by name; infinite where they have other names."""
    if old.keys() != new.keys():
        return math.inf
    return max((relative_difference(old[name], new[name]) for name in old), default=0.0)


def checkpoint_difference(old: Path, new: Path, base: Path) -> float:
    """Over what each tensor was changed by from its base; raises `ArtifactError`."""
    before, after, start = Checkpoint(old), Checkpoint(new), Checkpoint(base)
    if before.files.keys() != after.files.keys():
        return math.inf
    return max(relative_difference(*(side.tensor(name) for side in (before, after, start))) for name in before.files)


def gguf_difference(old: Path, new: Path) -> float:
    """Over each tensor of a folder's GGUF file, de-quantised; infinite where they hold other tensors."""
    return _table_difference(gguf_tensors(old / GGUF_FILE), gguf_tensors(new / GGUF_FILE))


def compare_hashes(name: str, expected: str, actual: str) -> Comparison:
    """Two SHA-256 that should be equal."""
    if expected == actual:
        return Comparison(name, "bytes")
    return Comparison(name, "differs", note=f"recorded {expected}, found {actual or 'nothing'}")


def compare_file(
    name: str, old: Path, new: Path, expected: str, difference: Difference, tolerance: float, note: str = ""
) -> Comparison:
    """A file with its original: by the recorded hash, or by its numbers where the original is here."""
    if sha256(new) == expected:
        return Comparison(name, "bytes", note=note)
    if not old.is_file() or sha256(old) != expected:
        note = "other bytes; the original is not here, so its numbers cannot be compared"
        return Comparison(name, "not compared", note=note)
    return _compare_numbers(name, difference(old, new), tolerance)


def compare_folder(
    old: Path, new: Path, provenance: Provenance, difference: Difference, tolerance: float
) -> Comparison:
    """A folder with its original, of `provenance`: file by file as they were recorded, or by its numbers."""
    edited = list(provenance.changed_files(old))  # an edited original proves nothing about the replay
    others = sorted(change.name for change in provenance.changed_files(new))
    if edited:
        result = "what was written came out again" if not others else "nor did that come out again"
        note = f"{old} is not what was written: {edited[0]}; {result}"
        return Comparison(provenance.form, "differs", note=note)
    if not others:
        return Comparison(provenance.form, "bytes")
    return _compare_numbers(provenance.form, difference(old, new), tolerance, f"other bytes: {', '.join(others)}")


def _compare_numbers(name: str, difference: float, tolerance: float, note: str = "") -> Comparison:
    return Comparison(name, "numbers" if difference <= tolerance else "differs", difference, note)
