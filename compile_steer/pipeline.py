"""The walk from contrast pairs to compiled patches: each function runs one span and leaves its artifact.

A span whose artifact is there and was made from the same inputs is kept, so a run that was killed goes
on where it stopped. What ships of the patches, and whether it is the steered model, is in `forms`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from compile_steer.artifacts.files import digest, save_text, sha256, was_edited
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower, RecipeError
from compile_steer.data.behaviour import require_distinct
from compile_steer.export.adapter import CURVES, is_adapter, kept_patch, write_patch
from compile_steer.export.gguf import gguf_refusals
from compile_steer.extract.generation_report import WritingReport
from compile_steer.extract.stage import extract, source
from compile_steer.lower.backends import BACKENDS
from compile_steer.lower.job import Job
from compile_steer.lower.plan import Choice, plan
from compile_steer.lower.work import Work
from compile_steer.models.load import revision_of
from compile_steer.report.card import model_card
from compile_steer.run import Run, load_program
from compile_steer.steering.directions import Directions
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.validate.report import ValidationReport
from compile_steer.validate.stage import validate
from compile_steer.validate.sweep import choose_layers
from compile_steer.verify.options import any_gguf


def run_write(run: Run) -> WritingReport:
    """What came of the pairs that the model wrote when the run was opened; raises `RecipeError` if it wrote none."""
    if run.recipe.data.generation is None:
        raise RecipeError(
            f"data.kind {run.recipe.data.kind}: its rows have their responses, there is nothing to write. The model "
            "writes the pairs of kind: generated and kind: instructions."
        )
    return WritingReport.load(run.paths.writing)


def _extracted_from(run: Run) -> str:
    """What directions depend on beside recipe, data and model: a file, a sibling, the positions they are trained for."""
    options = run.recipe.extract
    positions = run.recipe.validate_.positions if options.method == "trained" else ""
    return f"{source(run.recipe)} {positions} {'' if options.model is None else revision_of(options.model)}"


def run_extract(run: Run) -> Directions:
    """Directions of every block, from the training pairs."""
    distributed.require_alone("extraction")
    require_distinct(run.loaded.tokenizer, run.behaviour)
    inputs = run.inputs("data", "extract", after=_extracted_from(run))
    if run.paths.directions.is_file():
        try:
            kept = Directions.load(run.paths.directions)
            if kept.inputs == inputs:
                return kept
        except ArtifactError:
            pass  # damaged or older: it is made again below, and replaced as a whole
    directions = extract(run.recipe, run.loaded, run.behaviour, inputs, run.progress)
    directions.save(run.paths.directions, run.origin().header())
    return directions


def run_validate(run: Run) -> ValidationReport:
    """The chosen program and the report on it; extracts first if need be."""
    choose_layers(run.recipe.validate_, run.loaded.layout.n_layers)  # refuses what the model lacks before the work
    directions = run_extract(run)
    paths = run.paths
    after = digest([sha256(paths.directions), [asdict(pair) for pair in run.behaviour.mismatched]])
    inputs = run.inputs("data", "extract", "validate", "ask", "too_high", after=after)
    if paths.validation.is_file() and paths.program.is_file():
        try:
            kept = ValidationReport.load(paths.validation)
            same = kept.inputs == inputs and kept.program_hash == sha256(paths.program)
            if same and not was_edited(paths.validation):
                return kept
        except ArtifactError:
            pass  # damaged or older: it is made again below, and replaced as a whole

    def keep(program: Program) -> str:
        program.save(paths.program, run.origin(sha256(paths.directions)).header())
        return sha256(paths.program)

    report, rows = validate(run.recipe, run.loaded, run.behaviour, directions, keep, inputs, run.progress)
    save_text(paths.prompts, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report.save(paths.validation)
    return report


def _verdict(run: Run, force: bool) -> tuple[str, str]:
    """(verdict, hash of the report) that allow a compile; raises `CannotLower` where only force does."""
    path = run.paths.validation
    if not path.is_file():
        if not force:
            raise CannotLower(
                f"{run.paths.program} was never validated (no {path.name}). Run 'compile-steer validate' first, or "
                "compile with --force; the artifact will say so."
            )
        return "none", ""
    report = ValidationReport.load(path)
    other = [f"is about another program than {run.paths.program}"] * (report.program_hash != sha256(run.paths.program))
    other += ["was edited after it was written"] * was_edited(path)
    verdict = "none" if other else report.verdict
    if other and not force:
        raise CannotLower(f"{path} {' and '.join(other)}. Validate again, or use --force.")
    if verdict == "fail" and not force:
        reasons = "; ".join(report.reasons)
        raise CannotLower(f"validation failed: {reasons}. Mend the direction, or compile with --force.")
    return verdict, sha256(path)


def run_plan(run: Run) -> list[Choice]:
    """Which backends will run and why the others will not; raises `CannotLower`, also where the base cannot be a GGUF file
    that the recipe wants."""
    problems = gguf_refusals(WeightPatch(), run.loaded) if any_gguf(run.recipe.verify.forms) else []
    if problems:
        raise CannotLower([*problems, "Leave the gguf forms out of verify.forms."])
    return plan(canonical(load_program(run)), run.loaded.layout, run.recipe.compile.backends)


def run_compile(run: Run, force: bool = False) -> list[Path]:
    """Lower the program with every chosen backend; returns the folders of the patches."""
    program = canonical(load_program(run))
    verdict, report_hash = _verdict(run, force)
    chosen = [choice.backend for choice in run_plan(run) if choice.chosen]
    program_hash = sha256(run.paths.program)
    alone = distributed.count() == 1
    for name in chosen:
        if not BACKENDS[name].shares:
            distributed.require_alone(name)
    work = Work(run.paths.work if alone else None, run.inputs("data", "compile", after=program_hash))
    job = Job(program, run.loaded, run.behaviour, run.recipe.compile, run.recipe.seed, run.progress, work)
    folders = []
    for name in chosen:
        folder = run.paths.adapter(name)
        folders.append(folder)
        inputs = run.inputs("data", "compile", after=digest([program_hash, report_hash, verdict, force, name]))
        kept = kept_patch(folder, inputs)
        if kept is not None:
            job.finished[name] = kept
            continue
        if BACKENDS[name].fitted:
            _ = job.regression_texts  # written before the clock starts: every backend is given them
        started = time.perf_counter()
        job.curves.clear()
        patch = job.finished[name] = BACKENDS[name].lower(job)
        origin = replace(
            _provenance(run, name, patch, program),
            validation_sha256=report_hash,
            verdict=verdict,
            forced=force and verdict in ("fail", "none"),
            seconds=time.perf_counter() - started,
            inputs=inputs,
        )
        if distributed.rank() == 0:
            write_patch(folder, patch, run.loaded, origin, model_card(origin, run.paths.validation), job.curves)
    work.clear()
    return folders


def _provenance(run: Run, backend: str, patch: WeightPatch, program: Program) -> Provenance:
    """Where a patch comes from, but for what its validation said."""
    made_from = run.origin()
    return Provenance(
        name=run.recipe.name,
        backend=backend,
        form="adapter" if is_adapter(patch, run.loaded) else "patch",
        model=run.loaded.id,
        revision=run.loaded.revision,
        program=run.paths.program.name,
        program_sha256=sha256(run.paths.program),
        validation_sha256="",
        verdict="none",
        forced=False,
        recipe_sha256=made_from.recipe_sha256,
        data_sha256=made_from.data_sha256,
        seed=run.recipe.seed,
        seconds=0.0,
        inputs="",
        recipe=made_from.recipe,
        described=program.describe(),
        architecture=patch.architecture or run.loaded.model.config.model_type,
        biases=len(patch.bias),
    )


def read_curves(run: Run) -> dict[str, dict[str, list[float]]]:
    """The losses that the backends of the plan left beside their weights, by 'BACKEND, WHAT'."""
    found: dict[str, dict[str, list[float]]] = {}
    for choice in run_plan(run):
        path = run.paths.adapter(choice.backend) / CURVES
        if choice.chosen and path.is_file():
            found |= {f"{choice.backend}, {what}": one for what, one in json.loads(path.read_text("utf-8")).items()}
    return found
