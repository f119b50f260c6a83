"""Make an artifact again from the recipe that it carries, and report link by link whether the same came out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from compile_steer.artifacts.files import edit_check, sha256, was_edited
from compile_steer.artifacts.locks import locked
from compile_steer.artifacts.paths import RunPaths, home_path, real_path, require_inside
from compile_steer.artifacts.provenance import PROVENANCE, Origin, Provenance, versions
from compile_steer.artifacts.revision import other_revision
from compile_steer.common.errors import ArtifactError, shell_word
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import SPLITS
from compile_steer.models.source import revision_of
from compile_steer.pipeline.artifacts import compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe
from compile_steer.scoring.judge import Judge
from compile_steer.scoring.judge_client import require_confirmed
from compile_steer.tools.compare import (
    Comparison,
    checkpoint_difference,
    compare_file,
    compare_folder,
    compare_hashes,
    directions_difference,
    gguf_difference,
    patch_difference,
    program_difference,
    report_difference,
)
from compile_steer.tools.lineage import input_links, recipe_folder, recorded_recipe
from compile_steer.verification.options import Form


@dataclass(frozen=True)
class Reproduction:
    """The result of a replay. `versions` are the libraries that differ: (when the artifact was made, now)."""

    artifact: Path
    tolerance: float
    versions: dict[str, tuple[str, str]]
    links: list[Comparison]

    @property
    def agrees(self) -> bool:
        """True if nothing differs, and the artifact itself (the last link) could be compared."""
        states = [link.state for link in self.links]
        return "differs" not in states and bool(states) and states[-1] in ("bytes", "numbers")

    def summary(self) -> dict[str, Any]:
        """As JSON; a link that was compared by its bytes alone has difference None."""
        content = {"artifact": self.artifact, "agrees": self.agrees, **asdict(self)}
        for link in content["links"]:
            if link["difference"] == math.inf:  # JSON has no infinity, and null would say that nothing was compared
                link["difference"] = "infinite"
        return content


@dataclass(frozen=True)
class _Original:
    """The artifact with what it records about itself; `provenance` is None for a vector or directions."""

    path: Path
    origin: Origin
    provenance: Provenance | None
    recipes: Path | None
    model: str | None

    @property
    def paths(self) -> RunPaths:
        return RunPaths.of_artifact(self.path, str(self.origin.recipe["name"]))

    @property
    def vector_origin(self) -> Origin | None:
        """What the artifact's vector was made from; None for a vector that was written by hand.

        Without the vector's file, or with a damaged one, the artifact's own recipe stands for it.
        """
        if self.provenance is None or not self.paths.program.is_file():
            return self.origin
        try:
            return Origin.read(self.paths.program)
        except ArtifactError:
            return self.origin

    def recipe(self, origin: Origin) -> Recipe:
        """The recipe in `origin`, its paths relative to where the data are; raises `ArtifactError`."""
        return recalled_recipe(self.path, origin.recipe, self.recipes, self.model)


def recalled_recipe(path: Path, record: dict[str, Any], recipes: Path | None, model: str | None) -> Recipe:
    """The recipe that the artifact at `path` carries, to be run again; raises `ArtifactError`.

    Args:
        recipes: what its paths are relative to; None: found from where the artifact lies.
        model: the base that the user names; None: the recorded one, where that is no path out of the folders in use.
    """
    folder = recipes or recipe_folder(path, record)
    if folder is None:
        raise ArtifactError(
            f"none of the data of {path} lie at or above it; name the folder that the recipe's paths are relative "
            f"to (--recipes): {', '.join(map(str, Recipe.recall(record, Path()).data.files.values()))}."
        )
    recipe = recorded_recipe(record, folder)
    for part in recipe.validate_.score.parts:
        if isinstance(part, Judge):
            require_confirmed(part.base_url, own=False)
    if model is not None:
        return recipe.model_copy(update={"model": model})
    require_model_in_use(recipe.model, folder)
    return recipe


def require_model_in_use(model: str, folder: Path) -> None:
    """Raise `ArtifactError` where a recorded model is a path out of both `folder` and the current folder."""
    local = home_path(model)
    if (local.exists() or model.startswith((".", "/", "~"))) and not real_path(local).is_relative_to(real_path(folder)):
        require_inside(Path.cwd(), local, "model", f"name the model (--model {shell_word(model)})")


def reproduce(
    path: Path, to: Path, recipes: Path | None, tolerance: float, progress: Progress, model: str | None = None
) -> Reproduction:
    """Run the recorded recipe from its data on, in the empty folder `to`, up to the artifact at `path`.

    Stops before any work where recipe, data or base are not those that were recorded.

    Args:
        recipes: what the paths in the recorded recipe are relative to; None: found from where the artifact lies.
        tolerance: largest relative difference at which numbers agree.
        model: the base, where it is not where the recipe says.

    Raises:
        ArtifactError: the artifact cannot be read, recorded no recipe, or is arithmetic on others; `to` is not empty.
        RecipeError: data or model are not here.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ArtifactError(f"{to} is not an empty folder; a replay keeps nothing of an earlier run.")
    original = _read(real_path(path), recipes, model)
    # What an edited record says of recipe, data and base is not what the artifact was made from.
    if original.provenance is not None and was_edited(path / PROVENANCE):
        return Reproduction(path, tolerance, {}, [compare_hashes("record", *edit_check(path / PROVENANCE))])
    now = versions()
    then = original.origin.versions
    changed = {name: (version, now.get(name, "")) for name, version in then.items() if now.get(name) != version}
    links: list[Comparison] = []
    with locked(to):
        for compared in _replay(original, to, tolerance, progress):
            links += compared
            inputs = [link for link in compared if link.name.split()[0] in ("recipe", "base", "data")]
            if any(link.state == "differs" for link in inputs):
                break  # from other inputs something else comes out
    return Reproduction(path, tolerance, changed, links)


def _read(path: Path, recipes: Path | None, model: str | None) -> _Original:
    if path.suffix == ".json":
        raise ArtifactError(
            f"{path} is a report; name what it is about: a vector, directions, an adapter or merged folder."
        )
    provenance = Provenance.read(path) if path.is_dir() else None
    if provenance is not None and (provenance.members or provenance.recombined):
        made_of = provenance.recombined or ", ".join(provenance.members)
        raise ArtifactError(
            f"{path} is arithmetic on other artifacts ({made_of}); reproduce those, then run 'compile-steer compose' or "
            "'task-vector' again."
        )
    origin = Origin.read(path) if provenance is None else provenance.origin
    if origin is None or not origin.recipe:
        raise ArtifactError(
            f"{path} recorded no recipe: it is older than that, or was not made by 'compile-steer validate' or 'compile'. "
            "Run its recipe into another folder, and compare."
        )
    return _Original(path, origin, provenance, recipes, model)


def _replay(original: _Original, to: Path, tolerance: float, progress: Progress) -> Iterator[list[Comparison]]:
    """Make each artifact up to the original again, a step at a time; the caller stops where inputs differ."""
    own, origin, provenance = original.origin, original.vector_origin, original.provenance
    original.recipe(own)  # what must not be followed is said before anything is made
    if origin is not None:
        yield from _replay_vector(original, origin, to, tolerance, progress)
    elif provenance is not None:
        # A vector that was written by hand is taken as it is.
        old, new = original.paths.program, RunPaths(to, original.paths.name).program
        new.parent.mkdir(parents=True)
        shutil.copy(old, new)
        expected, note = provenance.program_sha256, "no recipe made it: taken as it is"
        yield [compare_file("vector", old, new, expected, program_difference, tolerance, note)]
    if provenance is None:
        return
    if origin is None or (origin.recipe_sha256, origin.data_sha256) != (own.recipe_sha256, own.data_sha256):
        yield list(_compare_inputs(original, own))
    yield list(_replay_compile(original, provenance, to, tolerance, progress))


def _replay_vector(
    original: _Original, origin: Origin, to: Path, tolerance: float, progress: Progress
) -> Iterator[list[Comparison]]:
    """From the data to the vector, or to the directions if the original is directions."""
    old, path, provenance = original.paths, original.path, original.provenance
    yield list(_compare_inputs(original, origin))
    run = Run.open(original.recipe(origin), to, progress)
    new = run.paths
    # With the model loaded, data sets and the pairs that the model generates can be compared too.
    hashes = run.origin().data_sha256
    files = {} if run.recipe.data.generation is not None else run.recipe.data.files
    yield [
        compare_hashes(f"data {name}", expected, hashes.get(name, ""))
        for name, expected in origin.data_sha256.items()
        if name in SPLITS and name not in files
    ]
    run.extract()
    if provenance is None and not origin.directions_sha256:  # only directions are made from no directions
        yield [compare_file("directions", path, new.directions, sha256(path), directions_difference, tolerance)]
        return
    expected = origin.directions_sha256
    yield [compare_file("directions", old.directions, new.directions, expected, directions_difference, tolerance)]
    run.validate()
    if provenance is None:
        yield [compare_file("vector", path, new.program, sha256(path), program_difference, tolerance)]
        return
    expected = provenance.validation_sha256
    yield [compare_file("validation", old.validation, new.validation, expected, report_difference, tolerance)]
    expected = provenance.program_sha256
    yield [compare_file("vector", old.program, new.program, expected, program_difference, tolerance)]


def _compare_inputs(original: _Original, origin: Origin) -> Iterator[Comparison]:
    """Recipe, base and data files with those that were recorded, before anything runs."""
    recipe = original.recipe(origin)
    files = [recipe.folder / file for file in recipe.data.files.values()]
    missing = [f"{file} does not exist; {original.path} was made from it." for file in files if not file.is_file()]
    if missing:
        raise ArtifactError(missing)
    generated = [f"data {name}" for name in SPLITS] if recipe.data.generation is not None else []
    for link in input_links(original.path, origin, recipe.folder):
        # Generated pairs are generated again; the rows' problems are raised when the data are read.
        if link.state != "missing" and link.name not in (*generated, "data"):  # a data set is no file: later
            yield compare_hashes(link.name, link.expected, link.actual)
    revision = revision_of(recipe.model)
    yield compare_hashes(
        "base", origin.revision, revision if other_revision(origin.revision, revision) else origin.revision
    )


def _replay_compile(
    original: _Original, provenance: Provenance, to: Path, tolerance: float, progress: Progress
) -> Iterator[Comparison]:
    """From the vector to the adapter or patch, and to the merged model if the original is one."""
    recipe = original.recipe(original.origin)
    backends, forms = recipe.compile.backends, recipe.verify.forms
    if backends != "auto" and provenance.backend in backends:  # a backend starts from those before it at most
        backends = backends[: backends.index(provenance.backend) + 1]
    if provenance.is_merged:
        forms = tuple(form for form in get_args(Form) if form == provenance.form)
    sections = {
        "compile": recipe.compile.model_copy(update={"backends": backends}),
        "verify": recipe.verify.model_copy(update={"forms": forms}),
    }
    run = Run.open(recipe.model_copy(update=sections), to, progress)
    compile_program(run, force=True)  # the verdict was compared with the validation report
    old, new = original.paths.adapter(provenance.backend), run.paths.adapter(provenance.backend)
    if not provenance.is_merged:
        yield compare_folder(original.path, new, provenance, patch_difference, tolerance)
        return
    patch = Provenance.read(old) if (old / PROVENANCE).is_file() else None
    if patch is not None and patch.files_sha256:
        yield compare_folder(old, new, patch, patch_difference, tolerance)
    (merged,) = merge(run, [new])
    from_base = partial(checkpoint_difference, base=Path(run.model.source))
    difference = gguf_difference if provenance.form.startswith("gguf-") else from_base
    yield compare_folder(original.path, merged, provenance, difference, tolerance)
