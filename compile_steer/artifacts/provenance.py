"""What an artifact records about itself, by SHA-256: where it comes from, its own files, what engines computed of it.

The lineage is data -> directions -> vector -> adapter -> merged model. A folder keeps its record in `compile_steer.json`,
a vector in the header of its safetensors file. Both hold the whole resolved recipe, so the way back to the data needs
nothing but the artifact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from compile_steer.artifacts.contents import file_hashes
from compile_steer.artifacts.files import digest, load_json, parse_header, save_record, was_edited
from compile_steer.artifacts.revision import other_revision
from compile_steer.artifacts.tensors import read_metadata
from compile_steer.common.errors import ArtifactError

EngineName = Literal["transformers", "vllm", "llama.cpp"]

PROVENANCE = "compile_steer.json"
PARITY = "parity.json"
CARD = "README.md"
ENGINES = "engines.json"
REPORTS = (PARITY, ENGINES, CARD)
"""Files about the folder, written again when it is verified: they are no part of what the folder is."""
_NOT_LOADED = (*REPORTS, PROVENANCE)
_ORIGIN = "origin"

# Two implementations of one computation in fp32 that sum in different orders differ by about half of this, in nats.
_ENGINE_TOLERANCE = 1e-4
# An engine's rms may be this many times its own rms on the base: the same rounding, on other numbers.
_ENGINE_NOISE = 2.0
# A file that is misread changes the gain by more than this, rounding by less.
_GAIN_TOLERANCE = 0.02


def versions() -> dict[str, str]:
    """Versions of the libraries that compute an artifact."""
    return {name: version(name) for name in ("compile_steer", "torch", "transformers", "peft", "safetensors")}


def artifact_sha256(folder: Path) -> str:
    """The hash by which other artifacts name this one: of weights, settings and provenance, without the reports."""
    return digest([list(file) for file in file_hashes(folder, without=REPORTS).items()])


def weights_sha256(folder: Path, hashes: Mapping[str, str] | None = None) -> str:
    """The hash by which reports name the folder: of everything that is loaded, without provenance and reports.

    Args:
        hashes: the folder's `file_hashes` where they are known already.
    """
    return digest([list(file) for file in _loaded_files(folder, hashes).items()])


def _loaded_files(folder: Path, hashes: Mapping[str, str] | None) -> dict[str, str]:
    if hashes is None:
        return file_hashes(folder, without=_NOT_LOADED)
    return {name: value for name, value in hashes.items() if name not in _NOT_LOADED}


@dataclass(frozen=True)
class Origin:
    """What directions or a vector were made from: the recipe with every default, its data, the model, the libraries.

    `data_sha256` has the hash of each source's rows, by the source's purpose. `directions_sha256` is the hash of the file
    that a vector was chosen from. `revision` is the model's.
    """

    recipe: dict[str, Any]
    recipe_sha256: str
    data_sha256: dict[str, str]
    revision: str
    directions_sha256: str = ""
    versions: dict[str, str] = field(default_factory=versions)

    def header(self) -> dict[str, Any]:
        """This origin as an entry of a safetensors header."""
        return {_ORIGIN: asdict(self)}

    @staticmethod
    def read(path: Path) -> Origin | None:
        """The origin in the header of a vector's or directions' file, None where none was recorded; raises `ArtifactError`."""
        metadata = read_metadata(path)
        key = next((key for key in ("program", "directions") if key in metadata), "")
        return parse_header(metadata, key, _Header, path, "Make it again.").origin if key else None


@dataclass(frozen=True)
class _Header:
    """What the header of every vector says of its origin, under the key `_ORIGIN`."""

    origin: Origin | None = None


@dataclass(frozen=True)
class ChangedFile:
    """A file of a folder that is not as it was written: SHA-256 then and now, '' where there is none."""

    name: str
    expected: str
    actual: str

    def __str__(self) -> str:
        if not self.actual:
            return f"{self.name} is missing"
        if not self.expected:
            return f"{self.name} is not among what was written"
        return f"{self.name} was changed (SHA-256 {self.expected[:12]} when it was written, {self.actual[:12]} now)"


@dataclass(frozen=True)
class Provenance:
    """What an artifact folder was made from."""

    name: str
    backend: str
    form: str
    model: str
    revision: str
    program: str
    program_sha256: str
    validation_sha256: str
    verdict: str  # the validation's; 'none' if the program was never validated
    forced: bool  # compiled with --force, against the verdict
    recipe_sha256: str
    data_sha256: dict[str, str]
    seed: int
    seconds: float  # time of lowering, without generating the calibration texts
    inputs: str
    parent: str = ""  # hash of the adapter that was merged, or the hashes of a task vector's patches
    members: dict[str, str] = field(default_factory=dict)  # hashes of a composition's adapters, by 'NAME x SCALE'
    recombined: str = ""  # the arithmetic of a task vector, in words
    versions: dict[str, str] = field(default_factory=versions)
    recipe: dict[str, Any] = field(default_factory=dict)  # with every default
    chat: dict[str, Any] = field(default_factory=dict)  # what the chat template was given: arguments, name, date
    described: str = ""  # the program in words
    architecture: str = ""  # the family whose stock code loads the result
    license: str = ""  # of the base, as its own files name it
    biases: int = 0  # the number of modules that were given a bias
    rank: int = 0  # of an adapter
    fingerprint: list[float] = field(default_factory=list)  # `models.fingerprint` in memory before writing
    files_sha256: dict[str, str] = field(default_factory=dict, compare=False)  # not known before it is written

    @property
    def is_merged(self) -> bool:
        """True of a whole model with the patch summed in (checkpoint or GGUF file), False of an adapter or patch."""
        return self.form.startswith(("merged-", "gguf-"))

    @property
    def has_all_bits(self) -> bool:
        """True of a form that stores every weight as it was compiled."""
        return self.form in ("adapter", "merged-fp32")

    @property
    def origin(self) -> Origin:
        """Recipe, data and base alone, as a vector records them."""
        return Origin(self.recipe, self.recipe_sha256, self.data_sha256, self.revision, versions=self.versions)

    def changed_files(self, folder: Path, hashes: Mapping[str, str] | None = None) -> Iterator[ChangedFile]:
        """Every file of `folder` that is not as it was written; none for old folders, which did not record their files.

        `hashes` as in `weights_sha256`.
        """
        written, actual = self.files_sha256, _loaded_files(folder, hashes)
        for name in sorted(written.keys() | actual.keys()) if written else ():
            if written.get(name) != actual.get(name):
                yield ChangedFile(name, written.get(name, ""), actual.get(name, ""))

    def write(self, folder: Path) -> None:
        """Record this provenance and the hashes of the files that `folder` holds; reports and card come later."""
        save_record(folder / PROVENANCE, asdict(replace(self, files_sha256=file_hashes(folder, without=_NOT_LOADED))))

    @staticmethod
    def read(folder: Path) -> Provenance:
        """Raises `ArtifactError` where the folder was not made by compile_steer, or its record is damaged."""
        path = folder / PROVENANCE
        if not folder.is_dir():
            raise ArtifactError(f"{folder} does not exist. Make it with 'compile-steer compile' (or 'merge').")
        if not path.is_file():
            raise ArtifactError(f"{folder} has no {PROVENANCE}: it was not made by compile_steer.")
        return load_json(path, Provenance, "record of an artifact", "Compile (or merge) again.")

    @staticmethod
    def read_unedited(
        folder: Path,
        base: tuple[str, str] | None = None,
        program_sha256: str = "",
        hashes: Mapping[str, str] | None = None,
    ) -> Provenance:
        """The provenance of a folder that is as it was written; raises `ArtifactError` with all that is wrong with any other.

        Args:
            base: name and revision of the model that it must be compiled for.
            program_sha256: of the program that it must be compiled from.
            hashes: the folder's `file_hashes` where they are known already.
        """
        origin = Provenance.read(folder)
        problems = [f"{folder}: {change}." for change in origin.changed_files(folder, hashes)]
        if was_edited(folder / PROVENANCE):
            problems.append(f"{folder / PROVENANCE} was edited after it was written, or lost its hash.")
        if program_sha256 and origin.program_sha256 != program_sha256:
            hashed = f"SHA-256 {origin.program_sha256[:12]}, found {program_sha256[:12]}"
            problems.append(f"{folder} was compiled from another program ({hashed}).")
        if base and (different := other_revision(origin.revision, base[1])):
            compiled, here = f"{origin.model} at {origin.revision}", " at ".join(base)
            problems.append(f"{folder} was compiled for {compiled}; the base here is {here}: {different}.")
        if problems:
            remedy = "Compile (or merge) again, put back what was written, or name the recipe that made it."
            raise ArtifactError([*problems, remedy])
        return origin

    @staticmethod
    def is_current(folder: Path, inputs: str) -> bool:
        """True if `folder` is as it was written, and was made from the same `inputs`: it need not be made again."""
        try:
            return Provenance.read_unedited(folder).inputs == inputs
        except ArtifactError:
            return False


@dataclass(frozen=True)
class EngineRecord:
    """What a serving engine computes of an artifact, compared with transformers: log p(token) in nats, over `tokens`."""

    engine: str
    form: str  # the file that was loaded, in words
    tokens: int = 0
    error: float = math.nan  # largest difference
    rms: float = math.nan  # root-mean-square difference
    base_error: float = math.nan  # the same for the base in this engine and format
    base_rms: float = math.nan
    effect: float = math.nan  # largest change by steering in transformers
    gain: float = math.nan  # slope of the engine's change by steering on transformers'; 0: loaded without effect
    problem: str = ""  # why nothing was measured
    version: str = ""  # the engine with the versions that matter, in words

    @property
    def passed(self) -> bool:
        """True where the engine computes what transformers does, as far as the precision of its format shows."""
        near = self.error <= _ENGINE_TOLERANCE or self.rms <= _ENGINE_NOISE * self.base_rms
        return near and abs(self.gain - 1) <= _GAIN_TOLERANCE


@dataclass(frozen=True)
class _EngineRecords:
    """`artifact` is the SHA-256 of the weights that were loaded."""

    artifact: str
    records: tuple[EngineRecord, ...]


def save_engine_records(folder: Path, records: Sequence[EngineRecord]) -> bool:
    """Write what engines computed of an artifact of ours into its folder, replacing older records of the same form.

    Returns False, and writes nothing, for a folder that is not ours or where no engine ran.
    """
    # Without a finite gain steering changed nothing in transformers: there was nothing to measure.
    measured = [record for record in records if not record.problem and math.isfinite(record.gain)]
    if not measured or not (folder / PROVENANCE).is_file():
        return False
    by_form = {(record.engine, record.form): record for record in (*load_engine_records(folder), *measured)}
    save_record(folder / ENGINES, asdict(_EngineRecords(weights_sha256(folder), tuple(by_form.values()))))
    return True


def load_engine_records(folder: Path) -> tuple[EngineRecord, ...]:
    """The records in `folder`, if they are of these weights and were not edited; else none. Raises `ArtifactError` if damaged."""
    path = folder / ENGINES
    if not path.is_file() or was_edited(path):
        return ()
    saved = load_json(path, _EngineRecords, "record of engines", "Run 'compile-steer verify-engines' again.")
    return saved.records if saved.artifact == weights_sha256(folder) else ()
