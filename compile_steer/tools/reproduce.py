"""Make an artifact again from the recipe that it carries, and say link by link whether the same came out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Origin, Provenance, versions
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import SPLITS
from compile_steer.models.load import revision_of
from compile_steer.pipeline.artifacts import compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe
from compile_steer.tools import compare
from compile_steer.tools.lineage import data_on_disk, home, recipe_folder
from compile_steer.verification.options import Form

TOLERANCE = 1e-3
"""Largest relative difference by which numbers still agree, if no other is asked for."""


@dataclass
class Reproduction:
    """What came of a replay. `versions` are those that differ: (when it was made, now)."""

    artifact: Path
    tolerance: float
    links: list[compare.Agreement] = field(default_factory=list)
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """True if nothing differs, and the artifact itself (the last link) could be compared."""
        states = [link.state for link in self.links]
        return "differs" not in states and bool(states) and states[-1] in ("bytes", "numbers")

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON; no difference at all is None, one that is no number 'infinite'."""
        links = [asdict(link) for link in self.links]
        for link in links:
            link["difference"] = "infinite" if link["difference"] == math.inf else link["difference"]
        return {
            "artifact": str(self.artifact),
            "agrees": self.agrees,
            "tolerance": self.tolerance,
            "versions": self.versions,
            "links": links,
        }


@dataclass(frozen=True)
class _Original:
    """The artifact with what it says of itself; `folder` is None for a vector or directions."""

    path: Path
    origin: Origin
    folder: Provenance | None
    recipes: Path | None

    @property
    def paths(self) -> RunPaths:
        return RunPaths(home(self.path), str(self.origin.recipe["name"]))

    def recipe(self, origin: Origin) -> Recipe:
        """What `origin` recorded, its paths relative to where the data are; raises `ArtifactError`."""
        folder = self.recipes or recipe_folder(self.path, origin.recipe)
        if folder is None:
            raise ArtifactError(
                f"none of the data of {self.path} lie at or above it; name the folder that the recipe's paths are relative "
                f"to (--recipes): {', '.join(map(str, Recipe.recall(origin.recipe, Path()).data.files.values()))}."
            )
        return Recipe.recall(origin.recipe, folder)


def reproduce(path: Path, to: Path, recipes: Path | None, tolerance: float, progress: Progress) -> Reproduction:
    """Run the recorded recipe from its data on, in the empty folder `to`, up to the artifact at `path`.

    Stops before any work where recipe, data or base are not those that were recorded.

    Raises:
        ArtifactError: the artifact cannot be read, recorded no recipe, or is arithmetic on others; `to` is not empty.
        RecipeError: data or model are not here.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ArtifactError(f"{to} is not an empty folder; a replay keeps nothing of an earlier run.")
    original = _read(path.resolve(), recipes)
    now = versions()
    changed = {name: (one, now.get(name, "")) for name, one in original.origin.versions.items() if now.get(name) != one}
    found = Reproduction(path, tolerance, versions=changed)
    found.links += _replayed(original, to, tolerance, progress)
    return found


def _read(path: Path, recipes: Path | None) -> _Original:
    if path.suffix == ".json":
        raise ArtifactError(
            f"{path} is a report; name what it is about: a vector, directions, an adapter or merged folder."
        )
    folder = Provenance.read(path) if path.is_dir() else None
    if folder is None:
        origin = Origin.read(path)
    else:
        if folder.members or folder.recombined:
            raise ArtifactError(
                f"{path} is arithmetic on other artifacts ({folder.recombined or ', '.join(folder.members)}); reproduce those, "
                "then run 'compile-steer compose' or 'task-vector' again."
            )
        origin = folder.origin
    if origin is None or not origin.recipe:
        raise ArtifactError(
            f"{path} recorded no recipe: it is older than that, or was not made by 'compile-steer validate' or 'compile'. "
            "Run its recipe into another folder, and compare."
        )
    return _Original(path, origin, folder, recipes)


def _replayed(original: _Original, to: Path, tolerance: float, progress: Progress) -> Iterator[compare.Agreement]:
    """Each link of the chain in turn, until recipe, data or base are found to be others."""
    folder = original.folder
    origin = original.origin if folder is None else _vectors(original, original.paths)
    if origin is None:
        yield _taken(original, to, tolerance)
    else:
        links = list(_vector(original, origin, to, tolerance, progress))
        yield from links
        if _stopped(links):
            return
    if folder is not None:
        yield from _compiled(original, folder, origin, to, tolerance, progress)


def _stopped(links: list[compare.Agreement]) -> bool:
    return any(link.state == "differs" and link.what.split()[0] in ("recipe", "base", "data") for link in links)


def _taken(original: _Original, to: Path, tolerance: float) -> compare.Agreement:
    """The vector that a compiled artifact was made from, where nothing but the file says what it is."""
    assert original.folder is not None, "a vector that was asked for has an origin"
    old, new = original.paths.program, RunPaths(to, original.paths.name).program
    new.parent.mkdir(parents=True)
    shutil.copy(old, new)
    note, expected = "no recipe made it: taken as it is", original.folder.program_sha256
    return compare.file("vector", old, new, expected, compare.of_programs, tolerance, note)


def _vector(
    original: _Original, origin: Origin, to: Path, tolerance: float, progress: Progress
) -> Iterator[compare.Agreement]:
    """From the data to the vector, or to the directions where these were asked for."""
    old, folder = original.paths, original.folder
    inputs = list(_same_inputs(original, origin))
    yield from inputs
    if _stopped(inputs):
        return
    run = Run.open(original.recipe(origin), to, progress)
    written = list(_same_data(run, origin))
    yield from written
    if _stopped(written):
        return
    run.extract()
    only = folder is None and not origin.directions_sha256  # directions know of none that they came from
    directions = original.path if only else old.directions
    expected = sha256(directions) if only else origin.directions_sha256
    yield compare.file("directions", directions, run.paths.directions, expected, compare.of_directions, tolerance)
    if only:
        return
    run.validate()
    if folder is not None:
        yield compare.file(
            "validation",
            old.validation,
            run.paths.validation,
            folder.validation_sha256,
            compare.of_reports,
            tolerance,
        )
    vector = original.path if folder is None else old.program
    expected = sha256(vector) if folder is None else folder.program_sha256
    yield compare.file("vector", vector, run.paths.program, expected, compare.of_programs, tolerance)


def _vectors(original: _Original, paths: RunPaths) -> Origin | None:
    """What a compiled artifact's vector was made from; None for one that was written by hand.

    Without the vector's file the artifact's own recipe stands for it.
    """
    if not paths.program.is_file():
        return original.origin
    try:
        return Origin.read(paths.program)
    except ArtifactError:
        return original.origin  # cut short, as 'show' says; its numbers cannot be compared


def _compiled(
    original: _Original, folder: Provenance, vectors: Origin | None, to: Path, tolerance: float, progress: Progress
) -> Iterator[compare.Agreement]:
    own = original.origin
    if vectors is None or (vectors.recipe_sha256, vectors.data_sha256) != (own.recipe_sha256, own.data_sha256):
        inputs = list(_same_inputs(original, own))
        yield from inputs
        if _stopped(inputs):
            return
    run = Run.open(_up_to(original.recipe(own), folder), to, progress)
    compile_program(run, force=True)  # whether the verdict is the same was looked at before
    old, new = original.paths.adapter(folder.backend), run.paths.adapter(folder.backend)
    if not folder.is_merged:
        yield compare.folder(folder.form, original.path, new, folder, compare.of_patches, tolerance)
        return
    before = Provenance.read(old) if (old / "compile_steer.json").is_file() else None
    if before is not None and before.files_sha256:
        yield compare.folder(before.form, old, new, before, compare.of_patches, tolerance)
    (merged,) = merge(run, [new])
    base = Path(run.model.source)

    def of_checkpoints(one: Path, other: Path) -> float:
        return compare.of_checkpoints(one, other, base)

    between = compare.of_gguf if folder.form.startswith("gguf-") else of_checkpoints
    yield compare.folder(folder.form, original.path, merged, folder, between, tolerance)


def _up_to(recipe: Recipe, folder: Provenance) -> Recipe:
    """The recipe without the backends that come after the wanted one, which it cannot have started from."""
    backends, forms = recipe.compile.backends, recipe.verify.forms
    if backends != "auto" and folder.backend in backends:
        backends = backends[: backends.index(folder.backend) + 1]
    if folder.is_merged:
        forms = tuple(form for form in get_args(Form) if form == folder.form)
    return recipe.model_copy(
        update={
            "compile": recipe.compile.model_copy(update={"backends": backends}),
            "verify": recipe.verify.model_copy(update={"forms": forms}),
        }
    )


def _same_inputs(original: _Original, origin: Origin) -> Iterator[compare.Agreement]:
    """Recipe, base and data files are those that were recorded: looked at before anything runs."""
    yield compare.hashes("recipe", origin.recipe_sha256, digest(origin.recipe))
    recipe = original.recipe(origin)
    lost = [str(recipe.folder / file) for file in recipe.data.files.values() if not (recipe.folder / file).is_file()]
    if lost:
        raise ArtifactError([f"{one} does not exist; {original.path} was made from it." for one in lost])
    there, _problems = data_on_disk(recipe, original.paths)
    written = SPLITS if recipe.data.generation is not None else ()
    for name, expected in origin.data_sha256.items():
        if name in there and name not in written:
            yield compare.hashes(f"data {name}", expected, there[name])
    yield compare.hashes("base", origin.revision, revision_of(recipe.model))


def _same_data(run: Run, origin: Origin) -> Iterator[compare.Agreement]:
    """What could only be read with the model there: data sets, and the pairs that it wrote itself."""
    there = run.origin().data_sha256
    files = {} if run.recipe.data.generation is not None else run.recipe.data.files
    for name, expected in origin.data_sha256.items():
        if name in SPLITS and name not in files:
            yield compare.hashes(f"data {name}", expected, there.get(name, ""))
