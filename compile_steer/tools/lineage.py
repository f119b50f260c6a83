"""The lineage of an artifact: every link from it back to its data, and whether what lies there is what was recorded.

Every artifact records the SHA-256 of what it was made from. What lies where a run leaves it is hashed again; what does
not lie there (an adapter alone, on another machine) cannot be checked, and is reported as missing.

Importing this module, and the lineage of a folder, need neither torch nor transformers, so that `show` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compile_steer.artifacts.files import digest, edit_check, parse_record, read_json, sha256, without_check
from compile_steer.artifacts.paths import RunPaths, require_inside
from compile_steer.artifacts.provenance import (
    ENGINES,
    PARITY,
    PROVENANCE,
    Origin,
    Provenance,
    artifact_sha256,
    weights_sha256,
)
from compile_steer.artifacts.tensors import read_metadata
from compile_steer.common.errors import ArtifactError, CompileSteerError, RecipeError, brief
from compile_steer.data.behaviour import SPLITS, prompts_key
from compile_steer.data.pairs import pairs_sha256, read_pairs
from compile_steer.data.section import PairsData
from compile_steer.data.sources import Dataset, Reader
from compile_steer.recipe import Recipe
from compile_steer.scoring.classifier import Classifier
from compile_steer.validation.report import ValidationReport

State = Literal["intact", "changed", "missing", "unrecorded"]


@dataclass(frozen=True)
class Link:
    """One step from an artifact back to its data.

    intact: `path` is what was recorded; changed: it is not; missing: nothing is here to compare with; unrecorded: the
    artifact is older than this record.
    """

    name: str  # what the artifact was made from, or is described by
    state: State
    path: str  # what was read
    expected: str = ""  # the recorded SHA-256, or words where there is no hash
    actual: str = ""  # that of what lies there


def lineage(path: Path, recipes: Path | None = None) -> Iterator[Link]:
    """Yield every link from the artifact at `path` (a folder, a vector, directions or a report) to its data.

    Args:
        recipes: what the paths in the recorded recipe are relative to; None: found from where the artifact lies.

    Raises:
        ArtifactError: the artifact itself cannot be read, or is not one of ours.
    """
    path = artifact_root(path.resolve())
    if path.is_dir():
        yield from _folder_links(path, recipes)
    elif path.suffix != ".json":
        yield from _vector_links(path, recipes)
    elif path.name.endswith(".validation.json"):
        report = ValidationReport.load(path)
        yield _edit_check("record", path)
        program = path.with_name(path.name.replace(".validation.json", ".safetensors"))
        vector = _recorded("vector", program, report.program_hash)
        yield vector
        if vector.state == "intact":
            yield from _vector_links(Path(vector.path), recipes)


def artifact_root(path: Path) -> Path:
    """The artifact that `path` is, or is a file of: of a folder with a record the folder."""
    return path.parent if path.is_file() and (path.parent / PROVENANCE).is_file() else path


def _folder_links(folder: Path, recipes: Path | None) -> Iterator[Link]:
    provenance = Provenance.read(folder)
    paths = RunPaths.of_artifact(folder, provenance.name)
    yield _edit_check("record", folder / PROVENANCE)
    changes = list(provenance.changed_files(folder))
    for change in changes:
        yield Link("files", "changed", str(folder / change.name), change.expected, change.actual)
    if not provenance.files_sha256:
        yield Link("files", "unrecorded", str(folder))
    elif not changes:
        yield Link("files", "intact", str(folder), actual=f"{len(provenance.files_sha256)} as they were written")
    yield from _report_links(folder)
    yield from _parent_links(folder, provenance, paths, recipes)
    if provenance.validation_sha256:
        validation = _recorded("validation", paths.validation, provenance.validation_sha256)
        yield validation
        if validation.state == "intact":
            yield _edit_check("validation's record", paths.validation)
    program = paths.program.with_name(Path(provenance.program).name)
    vector = _recorded("vector", program, provenance.program_sha256)
    yield vector
    if not provenance.members:  # the members' own lineages lead to the data
        yield from input_links(folder, provenance.origin, recipes)
        if vector.state == "intact":
            yield from _vector_links(program, recipes, checked=provenance.origin)


def _edit_check(name: str, path: Path) -> Link:
    """Whether a record was edited by hand since it was written."""
    expected, actual = edit_check(path)
    return _compared(name, path, expected, actual) if expected else Link(name, "unrecorded", str(path), "", actual)


def _recorded(name: str, path: Path, expected: str) -> Link:
    actual = "" if not path.exists() else artifact_sha256(path) if path.is_dir() else sha256(path)
    return _compared(name, path, expected, actual)


def _compared(name: str, path: Path | str, expected: str, actual: str) -> Link:
    state: State = "missing" if not actual else "intact" if actual == expected else "changed"
    return Link(name, state, str(path), expected, actual)


def _report_links(folder: Path) -> Iterator[Link]:
    """What was measured of the folder, by verification and in serving engines: is it of these weights?"""
    reports = [(PARITY, "parity's record", "parity is"), (ENGINES, "engines' record", "engines' records are")]
    present = [(folder / file, record, claim) for file, record, claim in reports if (folder / file).is_file()]
    weights = weights_sha256(folder) if present else ""  # hashes every file: seconds for a large model
    for path, record, claim in present:
        yield _edit_check(record, path)
        content = parse_record(
            read_json(path, "Make it again."), _Measured, f"{path} is damaged", "Make it again.", "ignore"
        )
        measured = content.sha256 or {"artifact": content.artifact}  # parity names other hashes beside it
        yield _compared(f"{claim} of these weights", path, measured.get("artifact", ""), weights)


@dataclass(frozen=True)
class _Measured:
    """The hashes of what a report was measured on."""

    artifact: str = ""
    sha256: dict[str, str] = field(default_factory=dict)


def _parent_links(folder: Path, provenance: Provenance, paths: RunPaths, recipes: Path | None) -> Iterator[Link]:
    """The patches that this one was merged, summed or composed from; of a composition their lineages too."""
    for name, expected in provenance.members.items():
        member = name.rpartition(" x ")[0]
        adapter = RunPaths(paths.out.parent / member, member).adapter(provenance.backend)
        link = _recorded(f"member {name}", adapter, expected)
        yield link
        if link.state == "intact":
            yield from (replace(inner, name=f"{member}: {inner.name}") for inner in _folder_links(adapter, recipes))
    hashes = provenance.parent.split()
    if provenance.is_merged and len(hashes) == 1:
        yield _recorded("adapter", paths.adapter(provenance.backend), hashes[0])
    elif hashes:
        # The parts of a task vector may have any name: they are found by their hashes.
        adapters = [path for path in sorted((paths.out / "adapters").glob("*")) if path.is_dir() and path != folder]
        known = {artifact_sha256(adapter): adapter for adapter in adapters}
        for expected in hashes:
            part = known.get(expected)
            yield Link("part", "missing" if part is None else "intact", str(part or paths.out / "adapters"), expected)


def _vector_links(path: Path, recipes: Path | None, checked: Origin | None = None) -> Iterator[Link]:
    """The links of a vector or directions; recipe and data are left out where they are those of `checked`."""
    origin = Origin.read(path)
    report = path.with_name(f"{path.stem}.validation.json")
    # A folder names its own report; only a vector by itself is checked against the one beside it.
    if checked is None and report.is_file():
        try:
            yield _recorded("validation is of this vector", path, ValidationReport.load(report).program_hash)
        except CompileSteerError as error:
            yield Link("validation is of this vector", "changed", str(report), "a complete report", error.problems[0])
    if origin is None:
        yield Link("vector's origin", "unrecorded", str(path))
        return
    if origin.directions_sha256:
        yield _recorded("directions", path.with_name(f"{path.stem}.directions.safetensors"), origin.directions_sha256)
    if checked is None or (checked.recipe_sha256, checked.data_sha256) != (origin.recipe_sha256, origin.data_sha256):
        yield from input_links(path, origin, recipes)


def input_links(path: Path, origin: Origin, recipes: Path | None) -> Iterator[Link]:
    """Yield the links to the recipe and the data that `origin`, recorded by the artifact at `path`, names."""
    where, hashes, problems = "", dict[str, str](), list[str]()
    if not origin.recipe:
        yield Link("recipe", "unrecorded", str(path), origin.recipe_sha256)
    else:
        recorded = _compared("recipe", path, origin.recipe_sha256, digest(origin.recipe))
        yield recorded
        try:
            # The paths of an edited recipe prove nothing.
            folder = (recipes or recipe_folder(path, origin.recipe)) if recorded.state == "intact" else None
            if folder is not None:
                where, recipe = str(folder), recorded_recipe(origin.recipe, folder)
                hashes, problems = data_hashes(recipe, RunPaths.of_artifact(path, recipe.name))
        except RecipeError:  # keys of another version: its data cannot be found
            where = "the recipe is of another version of compile_steer"
        except ArtifactError as error:  # a path that leads elsewhere: nothing is read
            where = error.problems[0]
    for name, expected in origin.data_sha256.items():
        yield _compared(f"data {name}", where, expected, hashes.get(name, ""))
    yield from (Link("data", "changed", where, "readable", problem) for problem in problems)


def recorded_recipe(record: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that an artifact records, with its paths below `folder`; raises `ArtifactError` where one leads elsewhere.

    An artifact may be a stranger's: what it names is read only where the user looks for data, and nothing is fetched.
    """
    recipe = Recipe.recall(record, folder)
    named: dict[str, Path | str | None] = {f"data.{part}": path for part, path in recipe.data.files.items()}
    for part in type(recipe.data).model_fields:
        source = getattr(recipe.data, part)
        if isinstance(source, Dataset):
            named |= {f"data.{part}.data_files": name for name in source.data_files}
            named |= {f"data.{part}": source.source} if (folder / source.source).exists() else {}
    named["extract.imported.file"] = recipe.extract.imported.file
    named["validate.other_behaviour"] = recipe.validate_.other_behaviour
    classifiers = [part for part in recipe.validate_.score.parts if isinstance(part, Classifier)]
    named |= {f"validate.score.model {number}": part.model for number, part in enumerate(classifiers)}
    for key, path in ((key, path) for key, path in named.items() if path is not None):
        if "://" in str(path):
            raise ArtifactError(f"{key}: the artifact records the address {brief(str(path))}, which is not contacted.")
        require_inside(folder, Path(path), key)
    return recipe


def recipe_folder(path: Path, recipe: dict[str, Any]) -> Path | None:
    """The nearest folder at or above the artifact, or its `recipes/`, that has data of the recorded recipe.

    Where the recipe lay is not recorded, as it holds for one machine only. The data's hashes tell whether they are the same.
    """
    files = Recipe.recall(recipe, path.parent).data.files.values()
    for parent in path.resolve().parents:
        for folder in (parent, parent / "recipes"):
            if any((folder / file).is_file() for file in files):
                return folder
    return None


def data_hashes(recipe: Recipe, paths: RunPaths) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the rows of every file that the recipe reads, under the keys of `Origin.data_sha256`, and the rows' problems.

    Files that are not there, and data sets that are no files, are left out.
    """
    hashes, problems = recipe.data.hashes(recipe.folder)
    if recipe.data.generation is not None:
        # The files hold prompts; the pairs that the model generated from them lie in the run's folder.
        hashes = {prompts_key(name) if name in SPLITS else name: value for name, value in hashes.items()}
        reader = Reader(paths.out)
        for name in SPLITS:
            if paths.pairs(name).is_file():
                reader.rows(name, paths.pairs(name).resolve(), PairsData.keys)
        hashes, problems = {**hashes, **reader.hashes}, [*problems, *reader.problems]
    if imported := recipe.extract.imported_sha256(recipe.folder):
        hashes["imported"] = imported
    other = recipe.validate_.other_behaviour
    if other is not None and (recipe.folder / other).is_file():
        try:
            pairs = read_pairs("validate.other_behaviour", recipe.folder / other)
            hashes["other_behaviour"] = pairs_sha256(tuple(pairs))
        except RecipeError as error:
            problems += error.problems
    return hashes, problems


def describe_artifact(path: Path) -> dict[str, Any]:
    """What an artifact of any kind says about itself, as JSON; raises `ArtifactError` where it cannot be read."""
    if path.is_dir():
        description: dict[str, Any] = {"kind": "artifact", "provenance": asdict(Provenance.read(path))}
        if (path / PARITY).is_file():
            description["parity"] = without_check(read_json(path / PARITY, "Verify again."))
        return description
    if path.suffix == ".json":
        content = without_check(read_json(path, "Make it again."))
        kind = "composition" if "matrix" in content else content.get("kind", "validation report")
        if kind == "validation report":
            content = asdict(ValidationReport.load(path))  # refuses files that are no report of ours
        return {"kind": kind, **content}

    from compile_steer.steering.directions import Directions
    from compile_steer.steering.program import Program

    if "directions" in read_metadata(path):
        directions = Directions.load(path)
        norms = [round(float(norm), 4) for norm in directions.vectors.norm(dim=-1)]
        source = {} if directions.source is None else {"source": asdict(directions.source)}
        curves = {"curves": dict(directions.curves)} if directions.curves else {}
        description = {"kind": "directions", "model": directions.model, "point": directions.point}
        return {**description, **source, **curves, "norms": norms}
    program = Program.load(path)
    lines = program.describe().splitlines()
    return {"kind": "program", "model": program.model, "revision": program.revision, "interventions": lines}
