"""The forms that ship: compiled patches -> merged checkpoints and GGUF files -> each judged as it lies on disk.

A form that is there and was made from the same patch is kept. Verification is never skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.provenance import PARITY, Provenance, artifact_sha256
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.export.adapter import read_patch
from compile_steer.export.gguf import gguf_refusals, write_gguf
from compile_steer.export.merged import is_merged, write_merged
from compile_steer.pipeline import run_plan
from compile_steer.report.card import model_card, update_card
from compile_steer.run import Run, load_program
from compile_steer.steering.patch import WeightPatch
from compile_steer.verify.options import any_gguf
from compile_steer.verify.parity import Parity
from compile_steer.verify.reference import Reference
from compile_steer.verify.stage import require_same_origin, verify_artifact


def run_merge(run: Run, given: Sequence[Path] = ()) -> list[Path]:
    """Merge every compiled patch, or the `given` ones, at the precisions that the recipe verifies; returns the folders.

    Raises:
        ArtifactError: a given folder holds no patch, or one of another base. CannotLower: a GGUF form cannot hold one.
    """
    distributed.require_alone("merging")
    wanted = [form for form in run.recipe.verify.forms if form != "adapter"]
    chosen = given or [run.paths.adapter(choice.backend) for choice in run_plan(run) if choice.chosen]
    patches = [(folder, *_patch(run, folder)) for folder in chosen]
    if any_gguf(wanted):
        _require_gguf(run, {folder: patch for folder, patch, _origin in patches})
    folders = []
    with run.progress.phase("merging in fp32, one cast", len(patches) * len(wanted)) as advance:
        for folder, patch, origin in patches:
            parent = artifact_sha256(folder)
            for form in wanted:
                folders.append(_merge(run, patch, replace(origin, form=form, parent=parent)))
                advance(1)
    return folders


def _patch(run: Run, folder: Path) -> tuple[WeightPatch, Provenance]:
    origin = Provenance.read_unedited(folder)
    problems = origin.base_mismatch(folder, run.loaded.id, run.loaded.revision)
    if problems:
        raise ArtifactError(problems)
    return read_patch(folder), origin


def _require_gguf(run: Run, patches: Mapping[Path, WeightPatch]) -> None:
    """Raise `CannotLower` with everything that keeps a patch from being a GGUF file, before any is written."""
    problems = [f"{folder}: {one}" for folder, patch in patches.items() for one in gguf_refusals(patch, run.loaded)]
    if problems:
        raise CannotLower([*problems, "Leave the gguf forms out of verify.forms."])


def _merge(run: Run, patch: WeightPatch, origin: Provenance) -> Path:
    """Write the form that `origin` says of the base with `patch`, unless it is there; returns its folder."""
    precision = precision_of(origin.form)
    folder = run.paths.merged(origin.backend, precision)
    now = replace(origin, inputs=digest([origin.inputs, origin.parent, precision]))
    if not is_merged(folder, now):
        write = write_gguf if origin.form.startswith("gguf-") else write_merged
        write(folder, patch, run.loaded, precision.removeprefix("gguf-"), now, model_card(now, run.paths.validation))
    return folder


def precision_of(form: str) -> str:
    """What stands for a whole model's form in its folder's name: fp32, bf16, fp16, gguf-f16, gguf-q8_0, gguf-q4_0."""
    return form.removeprefix("merged-")


def artifacts(run: Run) -> list[Path]:
    """The folders that the recipe wants verified, in the plan's order."""
    folders = []
    for choice in run_plan(run):
        if choice.chosen:
            for form in run.recipe.verify.forms:
                if form != "adapter":
                    folders.append(run.paths.merged(choice.backend, precision_of(form)))
                elif choice.adapter_refusal is None:
                    folders.append(run.paths.adapter(choice.backend))
    return folders


def run_verify(run: Run, folders: Sequence[Path], save: bool = True) -> list[Parity]:
    """Judge what is on disk; with `save` a parity.json is left beside each artifact."""
    distributed.require_alone("verification")
    program = load_program(run)
    program_hash = sha256(run.paths.program)
    problems: list[str] = []
    for folder in folders:
        try:
            require_same_origin(folder, run.loaded.id, run.loaded.revision, program_hash)
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    reference = Reference(run.recipe, run.loaded, program, run.behaviour, run.progress)
    found: dict[Path, Parity] = {}
    with run.progress.phase("verifying artifacts from disk", len(folders)) as advance:
        for folder in sorted(folders, key=_form):  # the base, rounded as a form is, is made once for all of that form
            parity = verify_artifact(reference, folder, program_hash, run.recipe.verify.gates)
            if save:
                parity.save(folder / PARITY)
                update_card(folder, run.paths.validation)
            found[folder] = parity
            advance(1)
    return [found[folder] for folder in folders]


def _form(folder: Path) -> str:
    return Provenance.read(folder).form


def verify_in_fresh_process(recipe: Path, out: Path, changes: Sequence[str]) -> int:
    """Run the judge as `compile-steer verify` in its own interpreter; returns its exit code.

    Nothing that the compiler did to its model in memory can reach it: it sees only what is on disk.
    """
    command = [sys.executable, "-m", "compile_steer", "verify", str(recipe), "--out", str(out), "--quiet"]
    for change in changes:
        command += ["--set", change]
    return subprocess.run(command, check=False).returncode


def read_parities(run: Run) -> list[Parity]:
    """The reports beside the artifacts, in the plan's order."""
    return [Parity.load(folder / PARITY) for folder in artifacts(run)]
