"""A run: a recipe with its model and data loaded, and the program that lies in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Origin
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.data.pairs import read_pairs
from compile_steer.extract.generate_pairs import write
from compile_steer.extract.stage import source
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Run:
    """A recipe with its model and data loaded: what every span needs."""

    recipe: Recipe
    paths: RunPaths
    loaded: LoadedModel
    behaviour: Behaviour
    progress: Progress

    @staticmethod
    def open(recipe: Recipe, out: Path, progress: Progress) -> Run:
        """Read the data first: it is quick, and the model may take minutes. Raises what either raises."""
        paths = RunPaths(out, recipe.name)
        asked = replace(recipe.data.read(recipe.folder), mismatched=mismatched(recipe))
        loaded = load(recipe.model, device=recipe.device, dtype=recipe.dtype, prompt_format=recipe.prompt_format)
        return Run(recipe, paths, loaded, answered(recipe, loaded, asked, paths, progress), progress)

    def inputs(self, *sections: str, after: str = "") -> str:
        """Fingerprint of what a span depends on: recipe sections, data, model, seed, the artifact before it."""
        asked = self.recipe.prompt_format
        model = [self.loaded.id, self.loaded.revision, self.recipe.dtype, self.recipe.seed, asked]
        return digest([self.recipe.part(*sections), self.behaviour.hashes, model, after])

    def origin(self, directions_sha256: str = "") -> Origin:
        """What this run's directions, or the vector chosen from them, are made from."""
        read = {"mismatched": _digest(self.behaviour.mismatched), "imported": source(self.recipe)}
        data = {**self.behaviour.hashes, **{name: found for name, found in read.items() if found}}
        return Origin(self.recipe.record, self.recipe.hash, data, self.loaded.revision, directions_sha256)


def _digest(pairs: tuple[Pair, ...]) -> str:
    return digest([asdict(pair) for pair in pairs]) if pairs else ""


def mismatched(recipe: Recipe) -> tuple[Pair, ...]:
    """Another behaviour's pairs, if the recipe names any; raises `RecipeError` where they cannot be read."""
    path = recipe.validate_.mismatched
    return () if path is None else tuple(read_pairs("validate.mismatched", recipe.folder / path))


def answered(recipe: Recipe, loaded: LoadedModel, asked: Behaviour, paths: RunPaths, progress: Progress) -> Behaviour:
    """The recipe's data with the responses that the model is to write; raises `RecipeError` where it writes too few."""
    options = recipe.data.generation
    return asked if options is None else write(recipe, options, loaded, asked, paths, progress)


def load_program(run: Run) -> Program:
    """The program on disk, checked against the model; raises `ArtifactError`."""
    program = Program.load(run.paths.program)
    run.loaded.layout.require_program(program, run.loaded.id, run.loaded.revision)
    return program
