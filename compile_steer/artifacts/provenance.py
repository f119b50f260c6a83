"""The chain data -> vector -> adapter -> merged: what each artifact records of where it comes from, by SHA-256.

A folder has `compile_steer.json`, a vector its safetensors header. Both hold the whole resolved recipe, so the way
back to the data needs nothing but the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compile_steer.artifacts.files import broken_seal, own_files, save_sealed, sha256, unsealed
from compile_steer.common.errors import ArtifactError

PROVENANCE = "compile_steer.json"
PARITY = "parity.json"
CARD = "README.md"
ENGINES = "engines.json"
REPORTS = (PARITY, ENGINES, CARD)
"""About the folder, written again when it is judged: no part of what it is."""
_ORIGIN = "origin"


def versions() -> dict[str, str]:
    """Versions of what computed an artifact."""
    return {name: version(name) for name in ("compile_steer", "torch", "transformers", "peft", "safetensors")}


def artifact_sha256(folder: Path) -> str:
    """What a folder made from this one records of it: weights, settings and provenance, not the reports about them."""
    return sha256(folder, without=REPORTS)


def weights_sha256(folder: Path) -> str:
    """What a parity report is about: everything that is loaded, whatever is said of it."""
    return sha256(folder, without=(*REPORTS, PROVENANCE))


@dataclass(frozen=True)
class Origin:
    """What directions or a vector were made from: the recipe with every default, its data, and what computed them.

    `data_sha256` is of the rows of each source, by its purpose; `directions_sha256` of the file that a vector was
    chosen from; `revision` is the model's.
    """

    recipe: dict[str, Any]
    recipe_sha256: str
    data_sha256: dict[str, str]
    revision: str
    directions_sha256: str = ""
    versions: dict[str, str] = field(default_factory=versions)

    def header(self) -> dict[str, Any]:
        """What goes beside the rest of a safetensors header."""
        return {_ORIGIN: asdict(self)}

    @staticmethod
    def read(path: Path) -> Origin | None:
        """The origin in the header of a vector's or directions' file; None where none was recorded.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            header = json.loads(metadata.get("program") or metadata.get("directions") or "{}")
            return Origin(**header[_ORIGIN]) if _ORIGIN in header else None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}). Make it again.") from error


@dataclass(frozen=True)
class Change:
    """A file of a folder that is not what was written: SHA-256 then and now, '' where there is none."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        if not self.found:
            return f"{self.file} is missing"
        if not self.expected:
            return f"{self.file} is not among what was written"
        return f"{self.file} was changed (SHA-256 {self.expected[:12]} when it was written, {self.found[:12]} now)"


@dataclass(frozen=True)
class Provenance:
    """What an artifact was made from.

    `verdict` is the validation's ('none' if the program was never validated), `forced` whether it was
    compiled against it. `seconds`: of lowering, the calibration texts written before. `parent` is the hash of
    the adapter that a merged checkpoint came from, or the hashes of the patches that a task vector was made from,
    and `recombined` the arithmetic on these in words. `members` are the hashes of the adapters that a composition
    was made of, by their names and dials. `recipe` has every default; `described` is the program in words,
    `architecture` the family whose stock code loads the result, `biases` how many modules were given a bias.
    `computes` is the `fingerprint` of the base with the patch on it in memory, before it was written: nats a token.
    `files_sha256` are the folder's own files, filled in when it is written.
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
    recipe: dict[str, Any] = field(default_factory=dict)
    described: str = ""
    architecture: str = ""
    biases: int = 0
    computes: list[float] = field(default_factory=list)
    files_sha256: dict[str, str] = field(default_factory=dict, compare=False)

    def of(self, **changes: Any) -> Provenance:
        return replace(self, **changes)

    @property
    def whole(self) -> bool:
        """True of a whole model, with the patch summed in; False of an adapter or patch."""
        return self.form.startswith(("merged-", "gguf-"))

    @property
    def origin(self) -> Origin:
        """Recipe, data and base alone, as a vector records them."""
        return Origin(self.recipe, self.recipe_sha256, self.data_sha256, self.revision, versions=self.versions)

    def foreign(self, folder: Path, model: str, revision: str) -> list[str]:
        """What is wrong, if `folder` (whose origin this is) changes another base than that."""
        if (self.model, self.revision) == (model, revision):
            return []
        return [
            f"{folder} changes {self.model}, revision {self.revision}; the recipe's base is {model}, revision {revision}. "
            "A task vector belongs to the base that it was made from."
        ]

    def changes(self, folder: Path) -> Iterator[Change]:
        """Every file of `folder` that is not what was written there; nothing is known of a folder that recorded none."""
        there = _files(folder)
        for name in sorted(self.files_sha256.keys() | there.keys()) if self.files_sha256 else ():
            expected, found = self.files_sha256.get(name, ""), there.get(name, "")
            if expected != found:
                yield Change(name, expected, found)

    def tampered(self, folder: Path) -> list[str]:
        """A line for everything in `folder` that was changed after it was written, its record included."""
        lines = [f"{folder}: {change}." for change in self.changes(folder)]
        if broken_seal(folder / PROVENANCE):
            lines.append(f"{folder / PROVENANCE} was edited after it was written.")
        return lines

    def write(self, folder: Path) -> None:
        """Record this origin and the files that `folder` holds by now; reports and the card come later."""
        save_sealed(folder / PROVENANCE, asdict(self.of(files_sha256=_files(folder))))

    @staticmethod
    def read(folder: Path) -> Provenance:
        """Raises `ArtifactError` where the folder is not one of ours or the file is damaged."""
        path = folder / PROVENANCE
        if not folder.is_dir():
            raise ArtifactError(f"{folder} does not exist. Make it with 'compile-steer compile' (or 'merge').")
        try:
            return Provenance(**unsealed(json.loads(path.read_text(encoding="utf-8"))))
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} has no {PROVENANCE}: it was not made by compile_steer.") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}). Compile again.") from error

    @staticmethod
    def untouched(folder: Path) -> Provenance:
        """The origin of a folder that is as it was written; raises `ArtifactError` for any other."""
        origin = Provenance.read(folder)
        problems = origin.tampered(folder)
        if problems:
            raise ArtifactError([*problems, "Compile (or merge) again, or put back what was written."])
        return origin


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of the folder's files by their relative names; not of the record and the reports."""
    return {name: sha256(folder / name) for name in own_files(folder) if name not in (*REPORTS, PROVENANCE)}
