"""Several programs at once: their adapters loaded together, stacked into one, and their sum compiled as one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path

from compile_steer.artifacts.files import digest, save_record, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError, shell_word
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import patch_provenance, read_patch, write_patch
from compile_steer.lowering.plan import BACKENDS, lower
from compile_steer.models.load import LoadedModel
from compile_steer.models.source import revision_of
from compile_steer.pipeline.run import load_base, with_generated_pairs
from compile_steer.recipe import CHAT_KEYS, Recipe
from compile_steer.report.card import model_card
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.interference import JOINT, STACKED, Composition, Member, measure_interference, sum_programs


@dataclass(frozen=True)
class CompositionRun:
    """Compiled behaviours of one model, loaded. The joint compile takes `compile` and `seed` of the first recipe."""

    recipes: tuple[Recipe, ...]
    members: tuple[Member, ...]
    backend: str
    paths: RunPaths
    model: LoadedModel
    progress: Progress

    @staticmethod
    def open(
        recipes: Sequence[Recipe],
        scales: Sequence[float],
        backend: str,
        runs: Path,
        out: Path | None,
        progress: Progress,
    ) -> CompositionRun:
        """Read the runs of `recipes` from `runs`/NAME, at `scales` (one a recipe, or none for 1 each).

        The composition goes to `out`, None for `runs`/NAME1+NAME2. Raises `CompileSteerError` with every reason why they
        cannot run together.
        """
        problems = list(_disagreements(recipes, scales, backend))
        members: list[Member] = []
        scales = scales if len(scales) == len(recipes) else [1.0] * len(recipes)
        paths = {recipe.name: RunPaths(runs / recipe.name, recipe.name) for recipe in recipes}
        for recipe, scale in zip(recipes, scales, strict=True):
            if backend in BACKENDS:
                try:
                    members.append(_read_member(recipe, paths[recipe.name], backend, scale))
                except CompileSteerError as error:
                    problems += error.problems
        for member in members[1:]:
            first = members[0]
            try:
                member.program.require(first.program.model, first.program.revision)
            except ArtifactError as error:
                problems.append(f"{first.name} and {member.name}: {error.problems[0]}")
        if problems:
            raise ArtifactError(problems)
        recipe = recipes[0]  # all name the same model, dtype and device
        model = load_base(recipe)
        for number, (own, member) in enumerate(zip(recipes, members, strict=True)):
            model.layout.require_program(member.program, model.id, model.revision)
            data = with_generated_pairs(own, model, member.data, paths[own.name], progress)
            members[number] = replace(member, data=data)
        name = "+".join(paths)
        return CompositionRun(
            tuple(recipes), tuple(members), backend, RunPaths(out or runs / name, name), model, progress
        )


def _disagreements(recipes: Sequence[Recipe], scales: Sequence[float], backend: str) -> Iterator[str]:
    """Everything that is wrong before a run is read."""
    names = [recipe.name for recipe in recipes]
    if len(recipes) < 2:
        yield f"compose: found {len(recipes)} recipe; needed: two or more, for programs that run at once."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"compose: {names.count(name)} recipes have the name '{name}'; give each its own name, and run."
    if scales and len(scales) != len(recipes):
        yield f"compose: {len(scales)} scales for {len(recipes)} recipes; give one --scale a recipe, in their order, or none."
    for scale in scales:
        if not math.isfinite(scale) or scale == 0:
            yield f"compose: a scale of {scale:g} is no program; leave that recipe out."
    if backend not in BACKENDS:
        yield f"compose: backend '{backend}' is unknown; use one of {', '.join(BACKENDS)}."
    for key in ("model", "prompt_format", *CHAT_KEYS, "dtype", "device"):
        values = {recipe.name: getattr(recipe, key) for recipe in recipes}
        different = set(map(str, values.values()))
        if key == "model" and len(different) > 1:  # two paths may lead to one model
            different = {_identity(name) for name in different}
        if len(different) > 1:
            listed = ", ".join(f"'{value}' ({name})" for name, value in values.items())
            yield f"compose: the recipes have different values of '{key}': {listed}; programs run at once on one model only."


def _identity(model: str) -> str:
    """The model's revision; its name where it is not there."""
    try:
        return revision_of(model)
    except CompileSteerError:
        return model


def _read_member(recipe: Recipe, paths: RunPaths, backend: str, scale: float) -> Member:
    """A recipe's data, program and adapter as they are on disk; raises `CompileSteerError` with every problem."""
    folder = paths.adapter(backend)
    problems = []
    if not paths.program.is_file():
        problems.append(f"{recipe.name}: {paths.program} does not exist. Make it with 'compile-steer validate'.")
    if not folder.is_dir():
        problems.append(
            f"{recipe.name}: {folder} does not exist. Make it with: compile-steer compile RECIPE "
            f"--out {shell_word(paths.out)} --set {shell_word(f'compile.backends=[{backend}]')}"
        )
    if problems:
        raise ArtifactError(problems)
    program = Program.load(paths.program)
    provenance = Provenance.read_unedited(folder, (program.model, program.revision), program.sha256)
    if provenance.form != "adapter":
        raise CannotLower(
            f"{recipe.name}: {folder} is no PEFT adapter ({backend} makes a merged checkpoint), so it cannot be loaded "
            "beside another or scaled. Exact backends add up exactly: save the sum of the programs and compile that, or "
            "compose with --backend closed_form."
        )
    read_patch(folder)  # a damaged one is refused before the model is loaded
    data = recipe.data.read(recipe.folder)
    return Member(recipe.name, data, recipe.verify, recipe.seed, program, folder, provenance, scale)


def compose(run: CompositionRun) -> Composition:
    """Stack the adapters, compile the sum of the programs, write both as adapters, and compare them with all hooks at once.

    Raises:
        CannotLower: the backend cannot express the sum as an adapter.
    """
    distributed.require_alone("composition")
    program = sum_programs(run.members, [member.scale for member in run.members])
    backend, layout = BACKENDS[run.backend], run.model.layout
    refusal = backend.refusal(canonical(program), layout) or backend.adapter_refusal(canonical(program), layout)
    if refusal is not None:
        raise CannotLower(f"{run.backend}: all programs at once: {refusal}.")
    program.save(run.paths.program)  # its hash goes into the provenance of both adapters
    program_sha256, members = sha256(run.paths.program), run.members
    parents = {f"{member.name} x {member.scale:g}": artifact_sha256(member.adapter) for member in members}
    settings = [run.recipes[0].part("compile", "dtype", "seed"), [member.data.hashes for member in members]]
    folders = {way: run.paths.composed(f"{run.backend}-{way}") for way in (STACKED, JOINT)}
    for way, folder in folders.items():
        inputs = digest([[parents, program_sha256, run.backend, way], settings])
        if not Provenance.is_current(folder, inputs):
            started = time.perf_counter()
            if way == STACKED:  # the exact sum; ranks add up
                patches = (member.scale * read_patch(member.adapter) for member in run.members)
                patch = sum(patches, start=WeightPatch())
            else:
                # The prompts take turns, each once: a compile that takes the first n is then fair to all members.
                rows = zip_longest(*(member.data.calibration for member in run.members))
                prompts = tuple(dict.fromkeys(text for row in rows for text in row if text is not None))
                options, seed = run.recipes[0].compile, run.recipes[0].seed
                patch = lower(
                    program, run.model, prompts, options, backend=run.backend, seed=seed, progress=run.progress
                )
            seconds, name = time.perf_counter() - started, f"{run.paths.name}-{way}"
            # Where it comes from are the hashes of its members, which have lineages of their own.
            provenance = replace(
                patch_provenance(name, run.backend, patch, run.model, program, seconds),
                program=run.paths.program.name,
                program_sha256=program_sha256,
                verdict=", ".join(f"{member.provenance.name} {member.provenance.verdict}" for member in members),
                forced=any(member.provenance.forced for member in members),
                recipe_sha256=digest([recipe.hash for recipe in run.recipes]),
                data_sha256={
                    f"{member.name}.{name}": value for member in members for name, value in member.data.hashes.items()
                },
                seed=run.recipes[0].seed,
                inputs=inputs,
                members=parents,
            )
            write_patch(folder, patch, run.model, provenance, model_card(provenance, folder, None))
    composition = measure_interference(run.model, run.members, run.backend, folders, run.progress)
    save_record(run.paths.composed(f"{run.backend}.json"), asdict(composition))
    return composition


def co_load(run: CompositionRun) -> Composition:
    """Load the members' adapters at once, as they are, and compare them with all hooks at once; nothing is compiled."""
    distributed.require_alone("verification")
    composition = measure_interference(run.model, run.members, run.backend, {}, run.progress)
    save_record(run.paths.composed(f"{run.backend}-loaded.json"), asdict(composition))
    return composition
