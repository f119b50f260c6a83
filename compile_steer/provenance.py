"""The chain data -> vector -> adapter -> merged, as SHA-256 hashes in `compile_steer.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compile_steer.errors import ArtifactError

PROVENANCE = "compile_steer.json"


def versions() -> dict[str, str]:
    """Versions of what computed an artifact."""
    return {name: version(name) for name in ("compile_steer", "torch", "transformers", "peft", "safetensors")}


@dataclass(frozen=True)
class Provenance:
    """What an artifact was made from.

    `verdict` is the validation's ('none' if the program was never validated), `forced` whether it was
    compiled against it. `seconds`: of lowering, the calibration texts written before. `parent` is the hash of
    the adapter that a merged checkpoint came from, or the hashes of the patches that a task vector was made from,
    and `recombined` the arithmetic on these in words. `members` are the hashes of the adapters that a composition
    was made of, by their names and dials.
    """

    name: str
    backend: str
    form: str
    model: str
    revision: str
    program: str
    program_sha256: str
    validation_sha256: str
    verdict: str
    forced: bool
    recipe_sha256: str
    data_sha256: dict[str, str]
    seed: int
    seconds: float
    inputs: str
    parent: str = ""
    members: dict[str, str] = field(default_factory=dict)
    recombined: str = ""
    versions: dict[str, str] = field(default_factory=versions)

    def of(self, **changes: Any) -> Provenance:
        return replace(self, **changes)

    def foreign(self, folder: Path, model: str, revision: str) -> list[str]:
        """What is wrong, if `folder` (whose origin this is) changes another base than that."""
        if (self.model, self.revision) == (model, revision):
            return []
        return [
            f"{folder} changes {self.model}, revision {self.revision}; the recipe's base is {model}, revision {revision}. "
            "A task vector belongs to the base that it was made from."
        ]

    def write(self, folder: Path) -> None:
        (folder / PROVENANCE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Provenance:
        """Raises `ArtifactError` where the folder is not one of ours or the file is damaged."""
        path = folder / PROVENANCE
        if not folder.is_dir():
            raise ArtifactError(f"{folder} does not exist. Make it with 'compile-steer compile' (or 'merge').")
        try:
            return Provenance(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} has no {PROVENANCE}: it was not made by compile_steer.") from error
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}). Compile again.") from error
