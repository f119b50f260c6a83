"""From the program to artifacts: compiled patches, merged checkpoints and GGUF files, each verified as it lies on disk.

An artifact that is there and was made from the same inputs is kept. Verification is never skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from compile_steer.artifacts.contents import unchanged
from compile_steer.artifacts.files import digest, load_json, sha256, was_edited
from compile_steer.artifacts.locks import for_child
from compile_steer.artifacts.provenance import PARITY, REPORTS, Provenance, artifact_sha256, versions, weights_sha256
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower, InternalError, shell_word
from compile_steer.export.adapter import CURVES, patch_provenance, read_patch, write_patch
from compile_steer.export.gguf import gguf_refusals, write_gguf
from compile_steer.export.merged import write_merged
from compile_steer.lowering.job import Lowering, ResumeFiles
from compile_steer.lowering.plan import BACKENDS, Choice
from compile_steer.pipeline.run import Run
from compile_steer.report.card import model_card, update_card
from compile_steer.report.page import write_page
from compile_steer.report.recommendation import Recommendation, recommend
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.options import any_gguf
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact


def compile_program(run: Run, force: bool = False) -> list[Path]:
    """Lower the program with every chosen backend; returns the folders of the patches."""
    verdict, report_sha256 = _verdict(run, force)
    folders = {name: run.paths.adapter(name) for name in run.plan.chosen}
    for name in folders:
        if not BACKENDS[name].distributed:
            distributed.require_alone(name)
    # One file of state cannot hold the place of several processes.
    work = run.paths.work if distributed.count() == 1 else None
    model, data, seed, origin = run.model, run.data, run.recipe.seed, run.origin()
    made_by = digest([run.program_sha256, versions(), str(model.device)])
    resume = ResumeFiles(work, run.inputs("data", "compile", after=made_by))
    lowering = Lowering(run.plan.program, model, data.calibration, run.recipe.compile, seed, run.progress, resume)
    for name, folder in folders.items():
        depends = digest([run.program_sha256, report_sha256, verdict, force, name])
        inputs = run.inputs("data", "compile", after=depends)
        kept = Provenance.read(folder) if Provenance.is_current(folder, inputs) else None
        if kept is not None:
            patch, seconds, curves = read_patch(folder), kept.seconds, _curves(folder)
        else:
            if BACKENDS[name].fitted:
                _ = lowering.regression_texts  # written before the clock starts: every backend is given them
            started = time.perf_counter()
            lowering.curves.clear()
            patch, curves = BACKENDS[name].lower(lowering), lowering.curves
            seconds = time.perf_counter() - started
        lowering.patches[name] = patch
        if kept is not None and kept.model == model.id:
            continue  # other files name a base that is called otherwise now, and are written again
        provenance = replace(
            patch_provenance(run.recipe.name, name, patch, model, run.plan.program, seconds),
            program=run.paths.program.name,
            program_sha256=run.program_sha256,
            validation_sha256=report_sha256,
            verdict=verdict,
            forced=force and verdict in ("fail", "none"),
            recipe_sha256=origin.recipe_sha256,
            data_sha256=origin.data_sha256,
            seed=seed,
            inputs=inputs,
            recipe=origin.recipe,
        )
        if distributed.rank() == 0:
            card = model_card(provenance, run.paths.validation)
            write_patch(folder, patch, model, provenance, card, curves)
    resume.clear()
    return list(folders.values())


def _verdict(run: Run, force: bool) -> tuple[str, str]:
    """Return (verdict, hash of the report) that allow a compile; raises `CannotLower` where only force does."""
    path = run.paths.validation
    if not path.is_file():
        if force:
            return "none", ""
        raise CannotLower(
            f"{run.paths.program} was never validated (no {path.name}). Run 'compile-steer validate' first, or "
            "compile with --force; the artifact will say so."
        )
    report = ValidationReport.load(path)
    problems = [f"is about another program than {run.paths.program}"] * (report.program_hash != run.program_sha256)
    problems += ["was edited after it was written"] * was_edited(path)
    if problems and not force:
        raise CannotLower(f"{path} {' and '.join(problems)}. Validate again, or use --force.")
    verdict = "none" if problems else report.verdict
    if verdict == "fail" and not force:
        reasons = "; ".join(report.reasons)
        raise CannotLower(f"validation failed: {reasons}. Fix the direction, or compile with --force.")
    return verdict, sha256(path)


def merge(run: Run, folders: Sequence[Path] = ()) -> list[Path]:
    """Merge every compiled patch, or those in `folders`, at the precisions that the recipe verifies; returns the folders.

    Raises:
        ArtifactError: a folder holds no patch, or one of another base. CannotLower: a GGUF file cannot hold one.
    """
    distributed.require_alone("merging")
    model, forms = run.model, [form for form in run.recipe.verify.forms if form != "adapter"]
    patches: dict[Path, tuple[WeightPatch, Provenance]] = {}
    chosen = {run.paths.adapter(name): name for name in run.plan.chosen}
    for folder in folders or chosen:
        with unchanged(folder, without=REPORTS):
            program_sha256 = "" if folders else run.program_sha256
            provenance = Provenance.read_unedited(folder, (model.id, model.revision), program_sha256)
            # What a folder is named for may be another's content, exchanged as a whole.
            if not folders and provenance.backend != chosen[folder]:
                holds = f"{folder} holds what {provenance.backend} compiled, not {chosen[folder]}."
                raise ArtifactError(f"{holds} Run 'compile-steer compile' again.")
            patches[folder] = read_patch(folder), provenance
    if any_gguf(forms):  # everything that keeps a patch from being a GGUF file, before any is written
        problems = [
            f"{folder}: {problem}" for folder, (patch, _) in patches.items() for problem in gguf_refusals(patch, model)
        ]
        if problems:
            raise CannotLower([*problems, "Leave the gguf forms out of verify.forms."])
    merged = []
    with run.progress.phase("merging in fp32, one cast", len(patches) * len(forms)) as advance:
        for folder, (patch, provenance) in patches.items():
            parent = artifact_sha256(folder)
            for form in forms:
                precision = form.removeprefix("merged-")
                target = run.paths.merged(provenance.backend, precision)
                inputs = digest([provenance.inputs, parent, precision])
                record = replace(provenance, form=form, parent=parent, inputs=inputs)
                if not Provenance.is_current(target, inputs):  # the parent's hash is of its whole provenance
                    write = write_gguf if form.startswith("gguf-") else write_merged
                    card = model_card(record, run.paths.validation)
                    write(target, patch, model, precision.removeprefix("gguf-"), record, card)
                merged.append(target)
                advance(1)
    return merged


def artifacts(run: Run) -> list[Path]:
    """Return the folders that the recipe wants verified, in the plan's order."""
    folders = []
    for choice in run.plan.choices:
        for form in run.recipe.verify.forms if choice.chosen else ():
            if form != "adapter":
                folders.append(run.paths.merged(choice.backend, form.removeprefix("merged-")))
            elif choice.adapter_refusal is None:
                folders.append(run.paths.adapter(choice.backend))
    return folders


def make_reference(run: Run, program: Program | None = None) -> Reference:
    """Return what the artifacts are compared with: the base and the model steered by the run's program, or by `program`."""
    recipe = run.recipe
    return Reference(run.context, program or run.program, recipe.verify, recipe.validate_.score, recipe.ask)


def verify(run: Run, folders: Sequence[Path], save: bool = True) -> list[Parity]:
    """Compare what is on disk with the steered model; with `save` a parity.json is left beside each artifact."""
    distributed.require_alone("verification")
    problems: list[str] = []
    origins: dict[Path, Provenance] = {}
    for folder in folders:
        try:
            origins[folder] = Provenance.read_unedited(folder, (run.model.id, run.model.revision), run.program_sha256)
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    reference = make_reference(run)
    parities: dict[Path, Parity] = {}
    with run.progress.phase("verifying artifacts from disk", len(folders)) as advance:
        # By form: the base, rounded as a form is, is made once for all artifacts of that form.
        for folder in sorted(folders, key=lambda folder: origins[folder].form):
            parity = verify_artifact(
                reference, folder, run.program_sha256, run.bonds, _other_inputs(run, origins[folder])
            )
            run.require_unchanged()  # every artifact reads the base from disk once more
            parities[folder] = parity
            if save:
                parity.save(folder / PARITY)
                update_card(folder, run.paths.validation)
            advance(1)
    return [parities[folder] for folder in folders]


def _other_inputs(run: Run, origin: Provenance) -> dict[str, str]:
    """Why the report is no report on the artifact's own data, if it is not, as an entry of `Parity.unmeasured`."""
    now = run.origin().data_sha256
    others = [name for name, value in origin.data_sha256.items() if now.get(name) != value]
    if not others or origin.members:  # a composition's members have data of their own
        return {}
    return {"its own data": f"measured on other data than it was compiled with: {', '.join(others)} changed since"}


@dataclass(frozen=True)
class RunResult:
    """What a run has come to so far: `plan` is empty until the validation has passed, the last two None until the end."""

    validation: ValidationReport
    plan: Sequence[Choice] = ()
    merged: Sequence[Path] = ()
    parities: Sequence[Parity] = ()
    recommendation: Recommendation | None = None
    page: Path | None = None

    @property
    def passed(self) -> bool:
        """True at the end of a run whose artifacts are all the steered model."""
        return self.page is not None and all(parity.passed for parity in self.parities)


def run_stages(run: Run, recipe: Path, changes: Sequence[str], force: bool) -> Iterator[RunResult]:
    """Run every stage in order and yield the result after each; ends early where the validation fails without `force`.

    `run` was read from `recipe` with `changes`, as the process that verifies will read it.
    """
    yield (result := RunResult(run.validate()))
    if result.validation.verdict == "fail" and not force:
        return
    yield (result := replace(result, plan=run.plan.choices))
    compile_program(run, force)
    yield (result := replace(result, merged=merge(run)))
    parities = verify_in_fresh_process(recipe, run.paths.out, changes)
    require_of_this_run(run, parities)
    shipped = recommend(parities, artifacts(run), verdict=result.validation.verdict)
    result = replace(result, parities=parities, recommendation=shipped, page=run.paths.report)
    trained = {name: _curves(run.paths.adapter(name)) for name in run.plan.chosen}
    curves = {f"{name}, {part}": curve for name, parts in trained.items() for part, curve in parts.items()}
    program = run.program.describe()
    write_page(run.paths.report, run.recipe, program, run.plan.choices, result.validation, parities, shipped, curves)
    yield result


def _curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """The losses that training left beside a patch's weights; none where nothing was trained."""
    path, kind = folder / CURVES, dict[str, dict[str, list[float]]]
    return load_json(path, kind, "record of losses", "Compile again.") if path.is_file() else {}


def require_of_this_run(run: Run, parities: Sequence[Parity]) -> None:
    """Raise `ArtifactError` unless the reports are of exactly what this run made, by this run's recipe, data and base."""
    run.require_unchanged()
    bonds = {**run.bonds, "program": run.program_sha256, "base": run.model.revision}
    expected = [{**bonds, "artifact": weights_sha256(folder)} for folder in artifacts(run)]
    measured = [{key: value for key, value in parity.sha256.items() if key != "texts"} for parity in parities]
    if measured != expected:
        pairs = zip_longest(expected, measured, fillvalue=dict[str, str]())
        others = {key for ours, theirs in pairs for key in ours | theirs if ours.get(key) != theirs.get(key)}
        raise ArtifactError(
            f"what was verified is not what this run made: {', '.join(sorted(others))} changed in between. Let nothing "
            "write to the recipe, its data or the output folder, and run this again."
        )


def verify_in_fresh_process(recipe: Path, out: Path, changes: Sequence[str]) -> list[Parity]:
    """Run `compile-steer verify` in its own interpreter and return the reports that this very process made.

    Nothing that the compiler did to its model in memory can reach it: it sees only what is on disk. Its reports come
    through a pipe, so those of an earlier run are never taken for its own.

    Raises:
        InternalError: the process crashed, or was killed. ArtifactError: it refused its input.
    """
    # -P: no module of the folder that the user stands in is imported in place of a library's.
    command = [sys.executable, "-P", "-m", "compile_steer", "verify", str(recipe), "--out", str(out), "--json"]
    command += [f"--set={change}" for change in changes]
    package = str(Path(__file__).parents[2])  # also where the package is not installed
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, **for_child(), "PYTHONPATH": paths}
    process = subprocess.run(command, check=False, stdout=subprocess.PIPE, env=environment)
    if process.returncode in (0, 1):
        try:
            return TypeAdapter(list[Parity]).validate_json(process.stdout)
        except ValidationError:
            pass  # a crash: Python's own exit code for one is 1 too
    again = (
        "The artifacts are complete, and are verified again by: compile-steer verify "
        f"{shell_word(recipe)} --out {shell_word(out)}"
    )
    if process.returncode == 2:
        raise ArtifactError(f"the verification refused its input (see the error above). {again}")
    raise InternalError(f"the verification ended with exit code {process.returncode} and left no report. {again}")
