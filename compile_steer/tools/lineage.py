"""The lineage of an artifact: every link from it back to its data, and whether what lies there is what was recorded.

Every artifact records the SHA-256 of what it was made from. What lies where a run leaves it is hashed again; what does
not lie there (an adapter alone, on another machine) cannot be checked, and is reported as missing.

Importing this module, and the lineage of a folder, need neither torch nor transformers, so that `show` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from compile_steer.artifacts.files import digest, edit_check
from compile_steer.artifacts.paths import RunPaths, real_path, require_inside
from compile_steer.artifacts.provenance import (
    PROVENANCE,
    Origin,
    Provenance,
    artifact_sha256,
)
from compile_steer.common.errors import ArtifactError, CompileSteerError, RecipeError, brief
from compile_steer.data.behaviour import SPLITS, prompts_key
from compile_steer.data.kinds import PairsData
from compile_steer.data.pairs import pairs_sha256, read_pairs
from compile_steer.data.sources import Reader
from compile_steer.lowering.options import BackendName
from compile_steer.recipe import Recipe
from compile_steer.tools.report_links import (
    Link,
    check_link,
    compared_link,
    edit_link,
    recorded_link,
    report_links,
    validation_links,
)
from compile_steer.validation.report import ValidationReport


def lineage(path: Path, recipes: Path | None = None) -> Iterator[Link]:
    """Yield every link from the artifact at `path` (a folder, a vector, directions or a report) to its data.

    Args:
        recipes: what the paths in the recorded recipe are relative to; None: found from where the artifact lies.

    Raises:
        ArtifactError: the artifact itself cannot be read, or is not one of ours.
    """
    path = artifact_root(real_path(path))
    if path.is_dir() or path.suffix != ".json":
        yield from (_folder_links if path.is_dir() else _vector_links)(path, recipes)
        return
    if not path.name.endswith(".validation.json"):
        yield check_link("record", path, *edit_check(path))
    else:
        yield edit_link("record", path)
        program = path.with_name(path.name.replace(".validation.json", ".safetensors"))
        vector = recorded_link("vector", program, ValidationReport.load(path).program_hash)
        yield vector
        if vector.state == "intact":
            yield from validation_links(path, Origin.read(program))
            yield from _origin_links(program, recipes, None)


def artifact_root(path: Path) -> Path:
    """The artifact that `path` is, or is a file of: of a folder with a record the folder."""
    return path.parent if path.is_file() and (path.parent / PROVENANCE).is_file() else path


def _folder_links(folder: Path, recipes: Path | None) -> Iterator[Link]:
    provenance = Provenance.read(folder)
    paths = RunPaths.of_artifact(folder, provenance.name)
    yield edit_link("record", folder / PROVENANCE)
    place = paths.place(provenance.backend, provenance.form)
    other_names = [paths.place(backend, provenance.form) for backend in get_args(BackendName)]
    if folder != place and folder in other_names and not provenance.members:  # exchanged with another of its run
        yield Link("place", "changed", str(folder), place.name, folder.name)
    changes = list(provenance.changed_files(folder))
    for change in changes:
        yield Link("files", "changed", str(folder / change.name), change.expected, change.actual)
    if not provenance.files_sha256:
        yield Link("files", "unrecorded", str(folder))
    elif not changes:
        yield Link("files", "intact", str(folder), actual=f"{len(provenance.files_sha256)} as they were written")
    yield from report_links(folder, provenance)
    yield from _parent_links(folder, provenance, paths, recipes)
    if provenance.validation_sha256:
        validation = recorded_link("validation", paths.validation, provenance.validation_sha256)
        yield validation
        if validation.state == "intact":
            yield edit_link("validation's record", paths.validation)
            yield from validation_links(paths.validation, provenance.origin, provenance.verdict)
    program = paths.program.with_name(Path(provenance.program).name)
    vector = recorded_link("vector", program, provenance.program_sha256)
    yield vector
    if not provenance.members:  # the members' own lineages lead to the data
        yield from input_links(folder, provenance.origin, recipes)
        if vector.state == "intact":
            yield from _vector_links(program, recipes, checked=provenance.origin)


def _parent_links(folder: Path, provenance: Provenance, paths: RunPaths, recipes: Path | None) -> Iterator[Link]:
    """The patches that this one was merged, summed or composed from; of a composition their lineages too."""
    for name, expected in provenance.members.items():
        member = name.rpartition(" x ")[0]
        adapter = RunPaths(paths.out.parent / member, member).adapter(provenance.backend)
        link = recorded_link(f"member {name}", adapter, expected)
        yield link
        if link.state == "intact":
            yield from (replace(inner, name=f"{member}: {inner.name}") for inner in _folder_links(adapter, recipes))
    hashes = provenance.parent.split()
    if provenance.is_merged and len(hashes) == 1:
        yield recorded_link("adapter", paths.adapter(provenance.backend), hashes[0])
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
            validation = recorded_link("validation is of this vector", path, ValidationReport.load(report).program_hash)
        except CompileSteerError as error:
            validation = Link(
                "validation is of this vector", "changed", str(report), "a complete report", error.problems[0]
            )
        yield validation
        if validation.state == "intact":
            yield edit_link("validation's record", report)
            yield from validation_links(report, origin)
    elif checked is None and origin is not None and origin.directions_sha256:  # chosen by a validation
        yield Link("validation is of this vector", "missing", str(report))
    yield from _origin_links(path, recipes, checked)


def _origin_links(path: Path, recipes: Path | None, checked: Origin | None) -> Iterator[Link]:
    """From a vector or directions to what they were made from; `checked` as in `_vector_links`."""
    origin = Origin.read(path)
    if origin is None:
        yield Link("vector's origin", "unrecorded", str(path))
        return
    if origin.directions_sha256:
        yield recorded_link(
            "directions", path.with_name(f"{path.stem}.directions.safetensors"), origin.directions_sha256
        )
    if checked is None or (checked.recipe_sha256, checked.data_sha256) != (origin.recipe_sha256, origin.data_sha256):
        yield from input_links(path, origin, recipes)


def input_links(path: Path, origin: Origin, recipes: Path | None) -> Iterator[Link]:
    """Yield the links to the recipe and the data that `origin`, recorded by the artifact at `path`, names."""
    where, hashes, problems = "", dict[str, str](), list[str]()
    if not origin.recipe:
        yield Link("recipe", "unrecorded", str(path), origin.recipe_sha256)
    else:
        recorded = compared_link("recipe", path, origin.recipe_sha256, digest(origin.recipe))
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
        yield compared_link(f"data {name}", where, expected, hashes.get(name, ""))
    yield from (Link("data", "changed", where, "readable", problem) for problem in problems)


def recorded_recipe(record: dict[str, Any], folder: Path) -> Recipe:
    """The recipe that an artifact records, with its paths below `folder`; raises `ArtifactError` where one leads elsewhere.

    An artifact may be a stranger's: what it names is read only where the user looks for data, and nothing is fetched.
    """
    recipe = Recipe.recall(record, folder)
    for key, path in recipe.named_paths():
        if "://" in path:
            raise ArtifactError(f"{key}: the artifact records the address {brief(path)}, which is not contacted.")
        require_inside(folder, Path(path), key)
    return recipe


def recipe_folder(path: Path, recipe: dict[str, Any]) -> Path | None:
    """The nearest folder at or above the artifact, or its `recipes/`, that has data of the recorded recipe.

    Where the recipe lay is not recorded, as it holds for one machine only. The data's hashes tell whether they are the same.
    """
    files = Recipe.recall(recipe, path.parent).data.files.values()
    for parent in real_path(path).parents:
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
                reader.rows(name, real_path(paths.pairs(name)), PairsData.keys)
        hashes, problems = {**hashes, **reader.hashes}, [*problems, *reader.problems]
    if imported := recipe.extract.imported_sha256(recipe.folder):
        hashes["imported"] = imported
    if scorer := recipe.validate_.score.revision:
        hashes["classifier"] = scorer
    other = recipe.validate_.other_behaviour
    if other is not None and (recipe.folder / other).is_file():
        try:
            pairs = read_pairs("validate.other_behaviour", recipe.folder / other)
            hashes["other_behaviour"] = pairs_sha256(tuple(pairs.values()))
        except RecipeError as error:
            problems += error.problems
    return hashes, problems
