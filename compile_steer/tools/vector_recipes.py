"""Vectors in and out: a recipe that starts from another tool's file, and a program as a file for other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compile_steer.artifacts.files import save_text
from compile_steer.common.errors import RecipeError
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe, rewritten
from compile_steer.steering.directions import Directions
from compile_steer.tools.vector_files import write_gguf, write_svec
from compile_steer.validate.sweep import candidates


@dataclass(frozen=True)
class Import:
    """A foreign file and what it cannot say of itself, as on the command line; `name` is the new recipe's."""

    file: Path
    name: str
    format: str | None = None
    layer_convention: str | None = None
    layer: int | None = None
    index: int | None = None
    joint: str | None = None

    def changes(self, recipe: Path) -> list[str]:
        """What makes `recipe` one that imports the file, as `key=value`."""
        section: dict[str, Any] = {
            # Not resolved: a hub's cache has links with names, and the names tell the format.
            "file": os.path.relpath(self.file.absolute(), recipe.resolve().parent),
            "format": self.format,
            "layer_convention": self.layer_convention,
            "layer": self.layer,
            "index": self.index,
            "joint": self._blocks(),
        }
        imported = {key: value for key, value in section.items() if value is not None}
        return [f"name={json.dumps(self.name)}", f"extract={json.dumps({'method': 'imported', 'imported': imported})}"]

    def _blocks(self) -> str | list[int] | None:
        if self.joint is None or self.joint == "all":
            return self.joint
        try:
            return [int(part) for part in self.joint.split(",")]
        except ValueError as error:
            raise RecipeError(f"--joint {self.joint}: needed: all, or blocks as 4,5,6.") from error


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that is not written yet."""

    path: Path
    text: str


def new_recipe(recipe: Recipe, base: Path, changes: Sequence[str]) -> NewRecipe:
    """`base` with the changes that made `recipe`, to lie beside it; raises `RecipeError` where another one does."""
    made = NewRecipe(base.with_name(f"{recipe.name}.yaml"), rewritten(base, changes))
    if made.path.exists() and made.path.read_text(encoding="utf-8") != made.text:
        raise RecipeError(f"{made.path} is there already and says something else. Choose another --to, or remove it.")
    return made


def run_import(run: Run, made: NewRecipe) -> Directions:
    """Read the file, check that it is of the run's model, and leave the directions and then the recipe.

    Raises:
        ArtifactError: the file is missing, damaged, unsafe, ambiguous, or of another model; no recipe is left then.
        RecipeError: the recipe's validate.layers are not those of the file.
    """
    directions = run.extract()
    candidates(run.recipe.validate_, directions)  # the base recipe's layers may be others than the file's
    save_text(made.path, made.text)
    return directions


def run_export(run: Run, kind: str, to: Path | None, convention: str | None) -> tuple[Path, list[str]]:
    """Write the program on disk as a vector file; returns its path and what its user should know.

    Raises:
        RecipeError: no such format, or a layer convention that it does not ask for, or lacks.
        CannotLower: the format cannot hold the program.
    """
    program = run.program
    path = to or run.paths.program.with_suffix(f".{kind}")
    model_type = str(run.model.model.config.model_type)
    match kind, convention:
        case "gguf", None:
            return path, write_gguf(path, program, model_type)
        case "svec", ("block" | "hidden_state") as named:
            return path, write_svec(path, program, model_type, named, run.model.layout.n_layers)
    raise RecipeError(
        f"--format {kind} --layer-convention {convention or 'not given'}: needed: gguf without a convention (all that read "
        "one add direction.k to the output of block k), or svec with block or hidden_state."
    )
