"""From the program to artifacts: compiled patches, merged checkpoints and GGUF files, each verified as it lies on disk.

An artifact that is there and was made from the same inputs is kept. Verification is never skipped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from compile_steer.artifacts.contents import unchanged
from compile_steer.artifacts.files import digest, sha256, was_edited
from compile_steer.artifacts.provenance import PARITY, REPORTS, Provenance, artifact_sha256, versions
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.export.adapter import base_named_in, patch_provenance, read_curves, read_patch, write_patch
from compile_steer.export.gguf import gguf_refusals, write_gguf
from compile_steer.export.merged import write_merged
from compile_steer.lowering.job import Lowering, ResumeFiles
from compile_steer.lowering.plan import BACKENDS
from compile_steer.pipeline.run import Run
from compile_steer.report.card import model_card, update_card
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
    if run.recipe.compile.distill.shard and (after := {"full", "full_cut"} & folders.keys()):
        raise CannotLower(
            f"compile.distill.shard leaves a part of the base in each process; {', '.join(after)} needs it whole."
        )
    model, data, seed, origin = run.model, run.data, run.recipe.seed, run.origin()
    made_by = digest([run.program_sha256, versions(), str(model.device)])
    resume = ResumeFiles(run.paths.work, run.inputs("data", "compile", after=made_by))
    lowering = Lowering(run.plan.program, model, data.calibration, run.recipe.compile, seed, run.progress, resume)
    for name, folder in folders.items():
        depends = digest([run.program_sha256, report_sha256, verdict, force, name])
        inputs = run.inputs("data", "compile", after=depends)
        kept = distributed.first(partial(_kept, folder, inputs))
        if kept is not None:
            patch, seconds, curves = read_patch(folder), kept.seconds, read_curves(folder)
        else:
            if BACKENDS[name].fitted:
                _ = lowering.regression_texts  # written before the clock starts: every backend is given them
            started = time.perf_counter()
            lowering.curves.clear()
            patch, curves = BACKENDS[name].lower(lowering), lowering.curves
            seconds = time.perf_counter() - started
        lowering.patches[name] = patch
        if kept is not None and kept.model == model.id and base_named_in(folder) in (None, model.loadable):
            continue  # other files name a base that is called otherwise now, or lies elsewhere, and are written again
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
        card = model_card(provenance, folder, run.paths.validation)
        distributed.first(partial(write_patch, folder, patch, model, provenance, card, curves))
    distributed.first(resume.clear)
    return list(folders.values())


def _kept(folder: Path, inputs: str) -> Provenance | None:
    """The provenance of the artifact at `folder`, if it was made from the same inputs."""
    return Provenance.read(folder) if Provenance.is_current(folder, inputs) else None


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
    return distributed.first(lambda: _merge(run, folders))


def _merge(run: Run, folders: Sequence[Path]) -> list[Path]:
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
                    card = model_card(record, target, run.paths.validation)
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
        # By form: the base, rounded as a form is, is made once for all artifacts of that form. Those with all bits first:
        # what is measured of them need not be measured of others that compute the same.
        for folder in sorted(folders, key=lambda folder: (not origins[folder].has_all_bits, origins[folder].form)):
            parity = verify_artifact(
                reference, folder, run.program_sha256, run.bonds, _other_inputs(run, origins[folder])
            )
            run.require_unchanged()  # every artifact reads the base from disk once more
            parities[folder] = parity
            if save:
                distributed.first(partial(_save_parity, folder, parity, run.paths.validation))
            advance(1)
        reference.keep()
    return [parities[folder] for folder in folders]


def _save_parity(folder: Path, parity: Parity, validation: Path) -> None:
    parity.save(folder / PARITY)
    update_card(folder, validation)


def _other_inputs(run: Run, origin: Provenance) -> dict[str, str]:
    """Why the report is no report on the artifact's own data, if it is not, as an entry of `Parity.unmeasured`."""
    now = run.origin().data_sha256
    others = [name for name, value in origin.data_sha256.items() if now.get(name) != value]
    if not others or origin.members:  # a composition's members have data of their own
        return {}
    return {"its own data": f"measured on other data than it was compiled with: {', '.join(others)} changed since"}
