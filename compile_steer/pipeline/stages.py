"""A whole run: every stage in order, and a verification in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from compile_steer.artifacts.files import was_edited
from compile_steer.artifacts.locks import for_child
from compile_steer.artifacts.provenance import PARITY, weights_sha256
from compile_steer.common import distributed
from compile_steer.common.detail import Detail, detail
from compile_steer.common.errors import ArtifactError, InternalError, shell_word
from compile_steer.export.adapter import read_curves
from compile_steer.lowering.plan import Choice
from compile_steer.pipeline.artifacts import artifacts, compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.report.card import update_card
from compile_steer.report.page import write_page
from compile_steer.report.recommendation import Recommendation, recommend
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.gates import judged
from compile_steer.verification.parity import Parity


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
    parities = kept_parities(run)
    if parities is None:
        parities = verify_in_fresh_process(recipe, run.paths.out, changes)
        require_of_this_run(run, parities)
    else:
        again = f"compile-steer verify {shell_word(recipe)} --out {shell_word(run.paths.out)}"
        run.progress.note(
            f"These very files were verified before, by the same recipe, data and libraries. Again: {again}"
        )
        for folder in artifacts(run):  # a kill between a report and its card leaves the card of before
            distributed.first(partial(update_card, folder, run.paths.validation))
    shipped = recommend(parities, artifacts(run), verdict=result.validation.verdict)
    result = replace(result, parities=parities, recommendation=shipped, page=run.paths.report)
    trained = {name: read_curves(run.paths.adapter(name)) for name in run.plan.chosen}
    curves = {f"{name}, {part}": curve for name, parts in trained.items() for part, curve in parts.items()}
    program = run.program.describe()
    made = run.paths.report, run.recipe, program, run.plan.choices, result.validation, parities, shipped, curves
    distributed.first(lambda: write_page(*made, n_validation=len(run.data.validation)))
    yield result


def kept_parities(run: Run) -> list[Parity] | None:
    """The reports beside the artifacts, where they are of exactly what this run makes; None where one is missing or is not.

    As of a validation, a report that was edited, or whose verdict does not follow from its figures, is not kept.
    """
    parities = []
    for folder in artifacts(run):
        path = folder / PARITY
        if not path.is_file() or was_edited(path):
            return None
        try:
            parity = Parity.load(path)
        except ArtifactError:  # of another version
            return None
        if judged(parity, run.recipe.verify.gates) != parity:
            return None
        parities.append(parity)
    return None if _unlike(run, parities) else parities


def require_of_this_run(run: Run, parities: Sequence[Parity]) -> None:
    """Raise `ArtifactError` unless the reports are of exactly what this run made, by this run's recipe, data and base."""
    if others := _unlike(run, parities):
        raise ArtifactError(
            f"what was verified is not what this run made: {', '.join(others)} changed in between. Let nothing write to "
            "the recipe, its data or the output folder, and run this again."
        )


def _unlike(run: Run, parities: Sequence[Parity]) -> list[str]:
    """By which of recipe, data, libraries, base, program and files the reports are not of what this run made."""
    run.require_unchanged()
    bonds = {**run.bonds, "program": run.program_sha256, "base": run.model.revision}
    expected = [{**bonds, "artifact": weights_sha256(folder)} for folder in artifacts(run)]
    measured = [{key: value for key, value in parity.sha256.items() if key != "texts"} for parity in parities]
    pairs = list(zip_longest(expected, measured, fillvalue=dict[str, str]()))
    return sorted({key for ours, theirs in pairs for key in ours | theirs if ours.get(key) != theirs.get(key)})


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
    command += {Detail.QUIET: ["--quiet"], Detail.NORMAL: [], Detail.VERBOSE: ["--verbose"]}[detail.get()]
    package = str(Path(__file__).parents[2])  # also where the package is not installed
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, **for_child(), **distributed.for_children(), "PYTHONPATH": paths}
    process = subprocess.run(command, check=False, stdout=subprocess.PIPE, env=environment)
    output = distributed.gather(process.stdout)[0]  # the process of rank 0 prints
    if process.returncode in (0, 1):
        try:
            return TypeAdapter(list[Parity]).validate_json(output)
        except ValidationError:
            pass  # a crash: Python's own exit code for one is 1 too
    again = (
        "The artifacts are complete, and are verified again by: compile-steer verify "
        f"{shell_word(recipe)} --out {shell_word(out)}"
    )
    if process.returncode == 2:
        raise ArtifactError(f"the verification refused its input (see the error above). {again}")
    raise InternalError(f"the verification ended with exit code {process.returncode} and left no report. {again}")
