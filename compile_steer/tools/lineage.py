"""Walk the chain from an artifact back to its data, and say which link holds.

Every artifact records the SHA-256 of what it was made from. What lies where a run leaves it is hashed again; what
does not lie there (an adapter by itself, on another machine) cannot be checked, and is said to be absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from compile_steer.artifacts.files import digest, edit_check, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import (
    ENGINES,
    PARITY,
    PROVENANCE,
    Origin,
    Provenance,
    artifact_sha256,
    weights_sha256,
)
from compile_steer.common.errors import CompileSteerError, RecipeError
from compile_steer.data.behaviour import SPLITS, prompts_key
from compile_steer.data.section import PairsData
from compile_steer.data.sources import Reader
from compile_steer.pipeline.run import other_behaviour, pairs_sha256
from compile_steer.recipe import Recipe
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity

State = Literal["whole", "broken", "absent", "unrecorded"]


@dataclass(frozen=True)
class Link:
    """One step of the chain. `expected` and `found` are SHA-256, or words where there is no hash; `where` is what was read.

    whole: both agree; broken: they do not; absent: there is nothing here to compare with; unrecorded: the artifact
    is older than this record.
    """

    what: str
    state: State
    where: str
    expected: str = ""
    found: str = ""


def walk(path: Path, recipes: Path | None = None) -> list[Link]:
    """Every link from the artifact at `path` (a folder, a vector, directions or a report) to its data.

    Args:
        recipes: what the paths in the recorded recipe are relative to; None: found from where the artifact lies.

    Raises:
        ArtifactError: the artifact itself cannot be read, or is not one of ours.
    """
    path = whole(path.resolve())
    if path.is_dir():
        return list(_folder(path, recipes))
    if path.suffix == ".json":
        return list(_report(path, recipes))
    return list(_vector(path, recipes))


def whole(path: Path) -> Path:
    """The artifact that `path` is, or is a file of: of a folder with a record the folder."""
    return path.parent if path.is_file() and (path.parent / PROVENANCE).is_file() else path


def home(path: Path) -> Path:
    """The output folder of the run that left the artifact at `path`."""
    return path.resolve().parent.parent


def _folder(folder: Path, recipes: Path | None) -> Iterator[Link]:
    origin = Provenance.read(folder)
    yield _sealed("record", folder / PROVENANCE)
    if origin.files_sha256:
        changes = list(origin.changed_files(folder))
        yield from (Link("files", "broken", str(folder / one.name), one.expected, one.actual) for one in changes)
        if not changes:
            yield Link("files", "whole", str(folder), found=f"{len(origin.files_sha256)} as they were written")
    else:
        yield Link("files", "unrecorded", str(folder))
    yield from _judged(folder)
    yield from _parents(folder, origin, recipes)
    paths = RunPaths(home(folder), origin.name)
    if origin.validation_sha256:
        link = _hashed("validation", paths.validation, origin.validation_sha256)
        yield link
        if link.state == "whole":
            yield _sealed("validation's record", paths.validation)
    vector = home(folder) / "vectors" / Path(origin.program).name
    link = _hashed("vector", vector, origin.program_sha256)
    yield link
    if origin.members:
        return  # their own chains lead to the data
    seen = origin.origin
    yield from _sources(folder, seen, recipes)
    if link.state == "whole":
        yield from _vector(vector, recipes, skip=seen)


def _sealed(what: str, path: Path) -> Link:
    """Is a record what was written? Nobody who edits one by hand keeps its seal."""
    expected, found = edit_check(path)
    state: State = "unrecorded" if not expected else "whole" if expected == found else "broken"
    return Link(what, state, str(path), expected, found)


def _hashed(what: str, path: Path, expected: str) -> Link:
    if not path.exists():
        return Link(what, "absent", str(path), expected)
    found = artifact_sha256(path) if path.is_dir() else sha256(path)
    return Link(what, "whole" if found == expected else "broken", str(path), expected, found)


def _judged(folder: Path) -> Iterator[Link]:
    """What was measured of the folder, by the judge and by serving engines: is it of these weights?"""
    parity, engines = folder / PARITY, folder / ENGINES
    if not parity.is_file() and not engines.is_file():
        return
    weights = weights_sha256(folder)

    def of_these(what: str, path: Path, expected: str) -> Link:
        return Link(what, "whole" if expected == weights else "broken", str(path), expected, weights)

    if parity.is_file():
        yield _sealed("parity's record", parity)
        yield of_these("parity is of these weights", parity, Parity.load(parity).sha256.get("artifact", ""))
    if engines.is_file():
        yield _sealed("engines' record", engines)
        measured = json.loads(engines.read_text(encoding="utf-8")).get("artifact", "")
        yield of_these("engines' readings are of these weights", engines, measured)


def _parents(folder: Path, origin: Provenance, recipes: Path | None) -> Iterator[Link]:
    """The patches that this one was merged, summed or composed from; of a composition their chains too."""
    out = home(folder)
    for name, expected in origin.members.items():
        member = name.rpartition(" x ")[0]
        adapter = RunPaths(out.parent / member, member).adapter(origin.backend)
        link = _hashed(f"member {name}", adapter, expected)
        yield link
        if link.state == "whole":
            yield from (replace(one, what=f"{member}: {one.what}") for one in _folder(adapter, recipes))
    hashes = origin.parent.split()
    if origin.is_merged and len(hashes) == 1:
        yield _hashed("adapter", RunPaths(out, origin.name).adapter(origin.backend), hashes[0])
        return
    known = {
        artifact_sha256(one): one for one in sorted((out / "adapters").glob("*")) if one.is_dir() and one != folder
    }
    for expected in hashes:
        one = known.get(expected)
        yield Link("part", "absent" if one is None else "whole", str(one or out / "adapters"), expected)


def _report(path: Path, recipes: Path | None) -> Iterator[Link]:
    name = path.name.removesuffix(".validation.json")
    if name == path.name:
        return
    report = ValidationReport.load(path)
    yield _sealed("record", path)
    vector = path.with_name(f"{name}.safetensors")
    link = _hashed("vector", vector, report.program_hash)
    yield link
    if link.state == "whole":
        yield from _vector(vector, recipes)


def _vector(path: Path, recipes: Path | None, skip: Origin | None = None) -> Iterator[Link]:
    """A vector's or directions' own chain; what `skip` says as well was looked at before."""
    origin = Origin.read(path)
    report = path.with_name(f"{path.stem}.validation.json")
    if skip is None and report.is_file():
        try:
            yield _hashed("validation is of this vector", path, ValidationReport.load(report).program_hash)
        except CompileSteerError as error:
            yield Link("validation is of this vector", "broken", str(report), "a whole report", error.problems[0])
    if origin is None:
        yield Link("vector's origin", "unrecorded", str(path))
        return
    if origin.directions_sha256:
        yield _hashed("directions", path.with_name(f"{path.stem}.directions.safetensors"), origin.directions_sha256)
    if skip is None or (skip.recipe_sha256, skip.data_sha256) != (origin.recipe_sha256, origin.data_sha256):
        yield from _sources(path, origin, recipes)


def _sources(path: Path, origin: Origin, recipes: Path | None) -> Iterator[Link]:
    """Recipe and data."""
    if not origin.recipe:
        yield Link("recipe", "unrecorded", str(path), origin.recipe_sha256)
        yield from (Link(f"data {name}", "absent", "", one) for name, one in origin.data_sha256.items())
        return
    found = digest(origin.recipe)
    yield Link("recipe", "whole" if found == origin.recipe_sha256 else "broken", str(path), origin.recipe_sha256, found)
    folder = recipes or recipe_folder(path, origin.recipe) if found == origin.recipe_sha256 else None
    if folder is None:
        yield from (Link(f"data {name}", "absent", "", one) for name, one in origin.data_sha256.items())
        return
    recipe = Recipe.recall(origin.recipe, folder)
    there, problems = data_on_disk(recipe, RunPaths(home(path), recipe.name))
    for name, expected in origin.data_sha256.items():
        found = there.get(name, "")
        state: State = "absent" if not found else "whole" if found == expected else "broken"
        yield Link(f"data {name}", state, str(folder), expected, found)
    yield from (Link("data", "broken", str(folder), "readable", one) for one in problems)


def recipe_folder(path: Path, recipe: dict[str, Any]) -> Path | None:
    """Where the recorded recipe's data lie: the nearest folder at or above the artifact, or its `recipes/`, that has them.

    Where a recipe lay is not recorded: it is of one machine. The data's hashes say whether they are the same.
    """
    files = Recipe.recall(recipe, path.parent).data.files.values()
    for above in path.resolve().parents:
        for folder in (above, above / "recipes"):
            if any((folder / file).is_file() for file in files):
                return folder
    return None


def data_on_disk(recipe: Recipe, paths: RunPaths) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the rows of every file that the recipe reads, under the keys of `Origin.data_sha256`; and what is wrong.

    A file that is not there is not among them, nor is a data set that is no file.
    """
    found, problems = recipe.data.hashes(recipe.folder)
    if recipe.data.generation is not None:
        found = {prompts_key(name) if name in SPLITS else name: one for name, one in found.items()}
        reader = Reader(paths.out)
        for name in SPLITS:
            if paths.pairs(name).is_file():
                reader.rows(name, paths.pairs(name).resolve(), PairsData.keys)
        found, problems = {**found, **reader.hashes}, [*problems, *reader.problems]
    other = recipe.validate_.other_behaviour
    read = {"imported": recipe.extract.imported_sha256(recipe.folder)}
    if other is not None and (recipe.folder / other).is_file():
        try:
            read["other_behaviour"] = pairs_sha256(other_behaviour(recipe))
        except RecipeError as error:
            problems = [*problems, *error.problems]
    return {**found, **{name: one for name, one in read.items() if one}}, problems
