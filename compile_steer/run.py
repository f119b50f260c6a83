"""A run: a recipe with its model and data loaded, and the program that lies in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import Places
from compile_steer.artifacts.provenance import Origin
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Meter
from compile_steer.data.behaviour import SPLITS, Behaviour, Pair, asked_key
from compile_steer.data.pairs import Pairs, read_pairs
from compile_steer.data.sources import Reader
from compile_steer.extract.generate_pairs import write
from compile_steer.extract.stage import source
from compile_steer.models.load import Loaded, load
from compile_steer.recipe import Recipe
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Run:
    """A recipe with its model and data loaded: what every span needs."""

    recipe: Recipe
    places: Places
    loaded: Loaded
    behaviour: Behaviour
    meter: Meter

    @staticmethod
    def open(recipe: Recipe, out: Path, meter: Meter) -> Run:
        """Read the data first: it is quick, and the model may take minutes. Raises what either raises."""
        places = Places(out, recipe.name)
        asked = replace(recipe.data.read(recipe.folder), mismatched=mismatched(recipe))
        loaded = load(recipe.model, device=recipe.device, dtype=recipe.dtype, prompt_format=recipe.prompt_format)
        return Run(recipe, places, loaded, answered(recipe, loaded, asked, places, meter), meter)

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


def data_on_disk(recipe: Recipe, places: Places) -> tuple[dict[str, str], list[str]]:
    """SHA-256 of the rows of every file that the recipe reads, under the keys of `Origin.data_sha256`; and what is wrong.

    A file that is not there is not among them, nor is a data set that is no file.
    """
    found, problems = recipe.data.hashes(recipe.folder)
    if recipe.data.writing is not None:
        found = {asked_key(name) if name in SPLITS else name: one for name, one in found.items()}
        reader = Reader(places.out)
        for name in SPLITS:
            if places.pairs(name).is_file():
                reader.rows(name, places.pairs(name).resolve(), Pairs.keys)
        found, problems = {**found, **reader.hashes}, [*problems, *reader.problems]
    other = recipe.validate_.mismatched
    read = {"imported": source(recipe)}
    if other is not None and (recipe.folder / other).is_file():
        try:
            read["mismatched"] = _digest(mismatched(recipe))
        except RecipeError as error:
            problems = [*problems, *error.problems]
    return {**found, **{name: one for name, one in read.items() if one}}, problems


def mismatched(recipe: Recipe) -> tuple[Pair, ...]:
    """Another behaviour's pairs, if the recipe names any; raises `RecipeError` where they cannot be read."""
    path = recipe.validate_.mismatched
    return () if path is None else tuple(read_pairs("validate.mismatched", recipe.folder / path))


def answered(recipe: Recipe, loaded: Loaded, asked: Behaviour, places: Places, meter: Meter) -> Behaviour:
    """The recipe's data with the responses that the model is to write; raises `RecipeError` where it writes too few."""
    options = recipe.data.writing
    return asked if options is None else write(recipe, options, loaded, asked, places, meter)


def load_program(run: Run) -> Program:
    """The program on disk, checked against the model; raises `ArtifactError`."""
    program = Program.load(run.places.program)
    run.loaded.layout.require_program(program, run.loaded.id, run.loaded.revision)
    return program
