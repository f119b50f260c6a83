"""The forms that ship: compiled patches -> merged checkpoints -> each judged as it lies on disk.

A form that is there and was made from the same patch is kept. Verification is never skipped.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compile_steer import processes
from compile_steer.card import model_card, update_card
from compile_steer.errors import ArtifactError
from compile_steer.export import is_merged, read_patch, write_merged
from compile_steer.files import digest, sha256
from compile_steer.patch import WeightPatch
from compile_steer.pipeline import run_plan
from compile_steer.provenance import PARITY, Provenance, artifact_sha256
from compile_steer.run import Run, load_program
from compile_steer.verify import Parity, Reference, require_same_origin, verify_artifact

_MERGED = {"merged-fp32": "fp32", "merged-bf16": "bf16", "merged-fp16": "fp16"}


def run_merge(run: Run, given: Sequence[Path] = ()) -> list[Path]:
    """Merge every compiled patch, or the `given` ones, at the precisions that the recipe verifies; returns the folders.

    Raises:
        ArtifactError: a given folder holds no patch, or one of another base.
    """
    processes.require_alone("merging")
    precisions = [_MERGED[form] for form in run.recipe.verify.forms if form in _MERGED]
    folders = []
    patches: list[tuple[Path, WeightPatch, Provenance]] = []
    chosen = given or [run.places.adapter(choice.backend) for choice in run_plan(run) if choice.chosen]
    for folder in chosen:
        origin = Provenance.untouched(folder)
        problems = origin.foreign(folder, run.loaded.id, run.loaded.revision)
        if problems:
            raise ArtifactError(problems)
        patches.append((folder, read_patch(folder), origin))
    with run.meter.phase("merging in fp32, one cast", len(patches) * len(precisions)) as tick:
        for folder, patch, origin in patches:
            parent = artifact_sha256(folder)
            for precision in precisions:
                merged = run.places.merged(origin.backend, precision)
                folders.append(merged)
                now = origin.of(
                    form=f"merged-{precision}", parent=parent, inputs=digest([origin.inputs, parent, precision])
                )
                if not is_merged(merged, now):
                    card = model_card(now, run.places.validation)
                    write_merged(merged, patch, run.loaded, precision, now, card)
                tick(1)
    return folders


def artifacts(run: Run) -> list[Path]:
    """The folders that the recipe wants verified, in the plan's order."""
    folders = []
    for choice in run_plan(run):
        if choice.chosen:
            for form in run.recipe.verify.forms:
                if form in _MERGED:
                    folders.append(run.places.merged(choice.backend, _MERGED[form]))
                elif choice.adapter_refusal is None:
                    folders.append(run.places.adapter(choice.backend))
    return folders


def run_verify(run: Run, folders: Sequence[Path], save: bool = True) -> list[Parity]:
    """Judge what is on disk; with `save` a parity.json is left beside each artifact."""
    processes.require_alone("verification")
    program = load_program(run)
    program_hash = sha256(run.places.program)
    problems: list[str] = []
    for folder in folders:
        try:
            require_same_origin(folder, run.loaded.id, run.loaded.revision, program_hash)
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    reference = Reference(run.recipe, run.loaded, program, run.behaviour, run.meter)
    found = []
    with run.meter.phase("verifying artifacts from disk", len(folders)) as tick:
        for folder in folders:
            parity = verify_artifact(reference, folder, program_hash, run.recipe.verify.gates)
            if save:
                parity.save(folder / PARITY)
                update_card(folder, run.places.validation)
            found.append(parity)
            tick(1)
    return found


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
