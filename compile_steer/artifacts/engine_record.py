"""What an engine computed of an artifact, and the record of it beside the artifact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import broken_seal, load_json, save_sealed
from compile_steer.artifacts.provenance import ENGINES, PROVENANCE, weights_sha256

TARGET = 1e-4
"""Nats: two implementations of one computation in fp32, each summing in its own order, differ by about half of this."""
_NOISE = 2.0  # times the engine's own rms on the base: the same rounding on other numbers
_DOSE = 0.02  # an error of a file's meaning is larger than this, one of rounding smaller

_NUMBERS = ("error", "rms", "base_error", "base_rms", "effect", "dose")


@dataclass(frozen=True)
class Reading:
    """One form in one engine against transformers, in nats of log p(token), over `tokens` of them.

    `error` and `rms` are the largest and the root mean square difference; `base_error` and `base_rms` the same on the
    base in this engine and format; `effect` the largest change by steering in transformers, and `dose` how much of all of it
    there is in the engine: 0 where a file was loaded without effect. `problem` is why there is no reading. `version` is the
    engine in words, with the versions that matter.
    """

    engine: str
    form: str
    tokens: int = 0
    error: float = float("nan")
    rms: float = float("nan")
    base_error: float = float("nan")
    base_rms: float = float("nan")
    effect: float = float("nan")
    dose: float = float("nan")
    problem: str = ""
    version: str = ""

    @property
    def passed(self) -> bool:
        """True where the engine computes what transformers does, as far as its format can tell."""
        near = self.error <= TARGET or self.rms <= _NOISE * self.base_rms
        return near and abs(self.dose - 1) <= _DOSE

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON; what is not a number is None."""
        numbers = {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items() if name in _NUMBERS
        }
        return {**asdict(self), **numbers, "passed": self.passed}


@dataclass(frozen=True)
class _Record:
    """`artifact` is the SHA-256 of the weights that the readings are of."""

    artifact: str
    readings: tuple[Reading, ...]


def keep_readings(folder: Path, found: Sequence[Reading]) -> bool:
    """Write what engines computed of one of our folders beside it, in the place of older readings of the same; True if so.

    Of somebody else's folder, and of an engine that did not run, nothing is written.
    """
    new = [one for one in found if not one.problem and math.isfinite(one.dose)]
    if not new or not (folder / PROVENANCE).is_file():
        return False
    weights, before = weights_sha256(folder), _record(folder)
    old = before.readings if before is not None and before.artifact == weights else ()
    by_form = {(one.engine, one.form): one for one in (*old, *new)}
    save_sealed(folder / ENGINES, asdict(_Record(weights, tuple(by_form.values()))))
    return True


def own_readings(folder: Path) -> tuple[Reading, ...]:
    """The readings beside `folder`, if they are of these weights and nobody edited them.

    Raises:
        ArtifactError: the record is damaged.
    """
    record = _record(folder)
    return record.readings if record is not None and record.artifact == weights_sha256(folder) else ()


def _record(folder: Path) -> _Record | None:
    """What lies beside `folder`, of whatever weights; None where there is nothing, or somebody edited it."""
    path = folder / ENGINES
    if not path.is_file() or broken_seal(path):
        return None
    return load_json(path, _Record, "record of engines", "verify-engines")
