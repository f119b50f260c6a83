"""Do two artifacts agree: in their bytes, or in their numbers?

A number's difference is ||new - old|| / ||old||, the largest of all tensors: of a vector c v, of a patch each matrix's
whole change B A (its factors are not unique), of a checkpoint what it changed of its base, of a GGUF file the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport

State = Literal["bytes", "numbers", "differs", "absent"]


@dataclass(frozen=True)
class Agreement:
    """One link made again: the same bytes; other bytes but numbers within the tolerance; neither; or, absent: other
    bytes, and the original is not here for its numbers. `difference` is the largest relative one."""

    what: str
    state: State
    difference: float | None = None
    note: str = ""


def between(old: Tensor | None, new: Tensor | None, base: Tensor | None = None) -> float:
    """||new - old|| / ||old - base||; infinite where one is missing or of another shape."""
    if old is None or new is None or old.shape != new.shape:
        return math.inf
    start = torch.zeros_like(old) if base is None or base.shape != old.shape else base
    size = float((old.double() - start.double()).norm())
    difference = float((new.double() - old.double()).norm())
    return 0.0 if difference == 0.0 else difference / size if size > 0 else math.inf


def _largest(differences: Iterable[float]) -> float:
    return max(differences, default=0.0)


def of_directions(old: Path, new: Path) -> float:
    """Of every block's direction; raises `ArtifactError`."""
    one, other = Directions.load(old), Directions.load(new)
    if one.vectors.shape != other.vectors.shape or one.point != other.point:
        return math.inf
    return _largest(between(a, b) for a, b in zip(one.vectors, other.vectors, strict=True))


def of_programs(old: Path, new: Path) -> float:
    """Of every intervention's c v; infinite where they are of other sites, operations or positions. Raises
    `ArtifactError`."""
    one, other = Program.load(old), Program.load(new)
    if one.shape != other.shape:
        return math.inf
    pairs = list(zip(one.interventions, other.interventions, strict=True))
    targets = [(torch.tensor([a.projection or 0.0]), torch.tensor([b.projection or 0.0])) for a, b in pairs]
    moved = _largest(between(a.coefficient * a.vector, b.coefficient * b.vector) for a, b in pairs)
    return max(moved, _largest(between(a, b) for a, b in targets))


def of_reports(old: Path, new: Path) -> float:
    """Of the effect on test pairs, relative to its size or to its interval's, whichever is larger; infinite where
    another layer, coefficient or verdict came out. Raises `ArtifactError`."""
    one, other = ValidationReport.load(old), ValidationReport.load(new)
    if (one.layer, one.verdict) != (other.layer, other.verdict):
        return math.inf
    size = max(abs(one.margin.value), one.margin.high - one.margin.low)
    difference = abs(one.margin.value - other.margin.value)
    return 0.0 if difference == 0.0 else difference / size


def of_patches(old: Path, new: Path) -> float:
    """Of every matrix and bias; raises `ArtifactError`."""
    one, other = (list(_parts(read_patch(folder))) for folder in (old, new))
    if [name for name, _factors in one] != [name for name, _factors in other]:
        return math.inf
    return _largest(between(_product(a), _product(b)) for (_name, a), (_other, b) in zip(one, other, strict=True))


def _parts(patch: WeightPatch) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """What is added, by name, in factors: a whole matrix is made only when it is compared."""
    for name in sorted(patch.low_rank):
        yield f"{name}.BA", (patch.low_rank[name].B, patch.low_rank[name].A)
    yield from ((f"{name}.weight", (patch.dense[name],)) for name in sorted(patch.dense))
    yield from ((f"{name}.bias", (patch.bias[name],)) for name in sorted(patch.bias))


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    return factors[0] @ factors[1] if len(factors) == 2 else factors[0]


def of_checkpoints(old: Path, new: Path, base: Path) -> float:
    """Of what each tensor was changed by from its base; raises `ArtifactError`."""
    one, other, start = Checkpoint(old), Checkpoint(new), Checkpoint(base)
    if one.files.keys() != other.files.keys():
        return math.inf
    return _largest(between(one.tensor(name), other.tensor(name), start.tensor(name)) for name in one.files)


def of_gguf(old: Path, new: Path) -> float:
    """Of each tensor of a folder's GGUF file, de-quantised; infinite where they hold other tensors."""
    one, other = (gguf_tensors(folder / GGUF_FILE) for folder in (old, new))
    return _largest(between(one[name], other[name]) for name in one) if one.keys() == other.keys() else math.inf


def hashes(what: str, expected: str, found: str) -> Agreement:
    """Two SHA-256 that are equal, or not."""
    if expected == found:
        return Agreement(what, "bytes")
    return Agreement(what, "differs", note=f"recorded {expected}, found {found or 'nothing'}")


def file(
    what: str,
    old: Path,
    new: Path,
    expected: str,
    difference: Callable[[Path, Path], float],
    tolerance: float,
    note: str = "",
) -> Agreement:
    """A file against its original: by the recorded hash, and by its numbers where the original is here."""
    if sha256(new) == expected:
        return Agreement(what, "bytes", note=note)
    if not old.is_file() or sha256(old) != expected:
        return Agreement(
            what, "absent", note="other bytes; the original is not here, so its numbers cannot be compared"
        )
    return _numbers(what, difference(old, new), tolerance)


def folder(
    what: str,
    old: Path,
    new: Path,
    recorded: Provenance,
    difference: Callable[[Path, Path], float],
    tolerance: float,
) -> Agreement:
    """A folder against its original, file by file as it was recorded."""
    tampered = list(recorded.changed_files(old))
    other = sorted(change.name for change in recorded.changed_files(new))
    if tampered:
        came = "what was written came out again" if not other else "nor did that come out again"
        return Agreement(what, "differs", note=f"{old} is not what was written: {tampered[0]}; {came}")
    if not other:
        return Agreement(what, "bytes")
    return _numbers(what, difference(old, new), tolerance, f"other bytes: {', '.join(other)}")


def _numbers(what: str, difference: float, tolerance: float, note: str = "") -> Agreement:
    return Agreement(what, "numbers" if difference <= tolerance else "differs", difference, note)
