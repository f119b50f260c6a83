"""The walk for several programs at once: their adapters loaded together, stacked into one, and their sum compiled as one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import kept_patch, read_patch, write_patch
from compile_steer.lowering.plan import BACKENDS, lower
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.text import Text
from compile_steer.pipeline.run import with_generated_pairs
from compile_steer.recipe import Recipe
from compile_steer.report.card import model_card
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.interference import JOINT, STACKED, Member, measure, summed
from compile_steer.tools.interference_report import Composition
from compile_steer.verification.stage import require_same_origin


@dataclass(frozen=True)
class Several:
    """Members that belong to one model, loaded; the first recipe's `compile` and `seed` are the joint compile's."""

    members: tuple[Member, ...]
    origins: tuple[Provenance, ...]
    backend: str
    paths: RunPaths
    loaded: LoadedModel
    progress: Progress

    @staticmethod
    def open(
        recipes: Sequence[Recipe], dials: Sequence[float], backend: str, runs: Path, out: Path, progress: Progress
    ) -> Several:
        """Read the runs of `recipes` from `runs`/NAME; `dials` are one a recipe, or none for 1 each.

        Raises:
            CompileSteerError: anything that keeps them from running together, all of it at once.
        """
        problems = list(_disagreements(recipes, dials, backend))
        found: list[tuple[Member, Provenance]] = []
        given = dials if len(dials) == len(recipes) else [1.0] * len(recipes)
        for recipe, dial in zip(recipes, given, strict=True):
            if backend in BACKENDS:
                try:
                    found.append(_member(recipe, _places(runs, recipe), backend, dial))
                except CompileSteerError as error:
                    problems += error.problems
        members, origins = (tuple(one) for one in zip(*found, strict=True)) if found else ((), ())
        problems += _other_models(members)
        if problems:
            raise ArtifactError(problems)
        first = recipes[0]
        loaded = load(first.model, device=first.device, dtype=first.dtype, prompt_format=first.prompt_format)
        for one in members:
            loaded.layout.require_program(one.program, loaded.id, loaded.revision)
        members = tuple(
            replace(
                one,
                behaviour=with_generated_pairs(one.recipe, loaded, one.behaviour, _places(runs, one.recipe), progress),
            )
            for one in members
        )
        return Several(members, origins, backend, RunPaths(out, joined(recipes)), loaded, progress)


def _places(runs: Path, recipe: Recipe) -> RunPaths:
    return RunPaths(runs / recipe.name, recipe.name)


def joined(recipes: Sequence[Recipe]) -> str:
    """The name of a composition."""
    return "+".join(recipe.name for recipe in recipes)


def _disagreements(recipes: Sequence[Recipe], dials: Sequence[float], backend: str) -> Iterator[str]:
    """What is wrong before anything is read."""
    names = [recipe.name for recipe in recipes]
    if len(recipes) < 2:
        yield f"compose: found {len(recipes)} recipe; needed: two or more, for programs that run at once."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"compose: {names.count(name)} recipes have the name '{name}'; give each its own name, and run."
    if dials and len(dials) != len(recipes):
        yield f"compose: {len(dials)} dials for {len(recipes)} recipes; give one --dial a recipe, in their order, or none."
    for dial in dials:
        if not math.isfinite(dial) or dial == 0:
            yield f"compose: a dial of {dial:g} is no program; leave that recipe out."
    if backend not in BACKENDS:
        yield f"compose: backend '{backend}' is unknown; use one of {', '.join(BACKENDS)}."
    for key in ("model", "prompt_format", "dtype", "device"):
        values = {recipe.name: getattr(recipe, key) for recipe in recipes}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"'{value}' ({name})" for name, value in values.items())
            yield f"compose: the recipes have different values of '{key}': {listed}; programs run at once on one model only."


def _member(recipe: Recipe, paths: RunPaths, backend: str, dial: float) -> tuple[Member, Provenance]:
    """One recipe's data, program and adapter as they are on disk; raises `CompileSteerError` with every problem."""
    problems: list[str] = []
    folder = paths.adapter(backend)
    if not paths.program.is_file():
        problems.append(f"{recipe.name}: {paths.program} does not exist. Make it with 'compile-steer validate'.")
    if not folder.is_dir():
        problems.append(
            f"{recipe.name}: {folder} does not exist. Make it with 'compile-steer compile --out {paths.out} "
            f"--set compile.backends=[{backend}]'."
        )
    if problems:
        raise ArtifactError(problems)
    program = Program.load(paths.program)
    origin = require_same_origin(folder, program.model, program.revision, sha256(paths.program))
    if origin.form != "adapter":
        raise CannotLower(
            f"{recipe.name}: {folder} is no PEFT adapter ({backend} makes a merged checkpoint), so it cannot be loaded "
            "beside another or dialled. Exact backends add up exactly: save the sum of the programs and compile that, or "
            "compose with --backend closed_form."
        )
    read_patch(folder)
    return Member(recipe, recipe.data.read(recipe.folder), program, folder, dial), origin


def _other_models(members: Sequence[Member]) -> Iterator[str]:
    """A line for each program that is for another model, or another revision, than the first one."""
    for one in members[1:]:
        try:
            one.program.require(members[0].program.model, members[0].program.revision)
        except ArtifactError as error:
            yield f"{members[0].name} and {one.name}: {error.problems[0]}"


def run_compose(several: Several) -> Composition:
    """Stack the adapters, compile the sum, leave both as adapters, and measure them against all hooks at once.

    Raises:
        CannotLower: the backend cannot express the sum as an adapter.
    """
    distributed.require_alone("composition")
    paths, backend = several.paths, several.backend
    program = summed(several.members, [one.dial for one in several.members])
    _require_legal(several, program)
    program.save(paths.program)
    folders = {way: paths.composed(backend, way) for way in (STACKED, JOINT)}
    for way, folder in folders.items():
        origin = _origin(several, way, program, sha256(paths.program))
        if kept_patch(folder, origin.inputs) is not None:
            continue
        started = time.perf_counter()
        patch = _stack(several) if way == STACKED else _compile(several, program)
        origin = replace(origin, seconds=time.perf_counter() - started)
        write_patch(folder, patch, several.loaded, origin, model_card(origin, None))
    found = measure(several.loaded, several.members, backend, folders, several.progress)
    found.save(paths.composition(backend))
    return found


def run_together(several: Several) -> Composition:
    """Load the members' adapters at once, as they lie, and measure them against all hooks at once; nothing is compiled."""
    distributed.require_alone("verification")
    found = measure(several.loaded, several.members, several.backend, {}, several.progress)
    found.save(several.paths.co_loaded(several.backend))
    return found


def _require_legal(several: Several, program: Program) -> None:
    backend, whole, layout = BACKENDS[several.backend], canonical(program), several.loaded.layout
    refusal = backend.refusal(whole, layout) or backend.adapter_refusal(whole, layout)
    if refusal is not None:
        raise CannotLower(f"{several.backend}: all programs at once: {refusal}.")


def _stack(several: Several) -> WeightPatch:
    """All adapters as one: the exact sum, ranks beside each other, each times its dial."""
    patch = WeightPatch()
    for one in several.members:
        patch += one.dial * read_patch(one.adapter)
    return patch


def _compile(several: Several, program: Program) -> WeightPatch:
    """The sum of the programs lowered as one, on texts that the model writes under all of them."""
    first = several.members[0]
    prompts = _in_turn([one.behaviour.calibration for one in several.members])
    return lower(
        program,
        several.loaded,
        prompts,
        first.recipe.compile,
        backend=several.backend,
        seed=first.recipe.seed,
        progress=several.progress,
    )


def _in_turn(lists: Sequence[Sequence[Text]]) -> tuple[Text, ...]:
    """One text of each list in turn, each text once: a compile that takes the first so many is then fair to all."""
    rows = zip_longest(*lists)
    return tuple(dict.fromkeys(text for row in rows for text in row if text is not None))


def _origin(several: Several, way: str, program: Program, program_sha256: str) -> Provenance:
    """Where the composed adapter comes from: its members' hashes, and with them their whole chains."""
    first = several.members[0].recipe
    members = {f"{one.name} x {one.dial:g}": artifact_sha256(one.adapter) for one in several.members}
    made_of = [members, program_sha256, several.backend, way]
    settings = [first.part("compile", "dtype", "seed"), [one.behaviour.hashes for one in several.members]]
    return Provenance(
        name=f"{several.paths.name}-{way}",
        backend=several.backend,
        form="adapter",
        model=several.loaded.id,
        revision=several.loaded.revision,
        program=several.paths.program.name,
        program_sha256=program_sha256,
        validation_sha256="",
        verdict=", ".join(f"{origin.name} {origin.verdict}" for origin in several.origins),
        forced=any(origin.forced for origin in several.origins),
        recipe_sha256=digest([one.recipe.hash for one in several.members]),
        data_sha256={f"{one.name}.{n}": h for one in several.members for n, h in one.behaviour.hashes.items()},
        seed=first.seed,
        seconds=0.0,
        inputs=digest([made_of, settings]),
        members=members,
        described=program.describe(),
        architecture=several.loaded.model.config.model_type,
    )
