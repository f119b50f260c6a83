"""The examples in vectors/ and adapters/ are what their records say, and pass verification again."""

from __future__ import annotations

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.pipeline.artifacts import verify
from compile_steer.pipeline.run import Run
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from tests.end_to_end.conftest import ROOT

COMMITTED = RunPaths(ROOT, "ocean")
ADAPTER = COMMITTED.adapter("closed_form")


def test_committed_program_is_the_one_that_was_validated() -> None:
    report = ValidationReport.load(COMMITTED.validation)
    assert report.verdict == "pass"
    assert report.program_hash == sha256(COMMITTED.program)
    (intervention,) = Program.load(COMMITTED.program).interventions
    assert (intervention.site.layer, intervention.coefficient) == (report.layer, report.coefficient)


def test_committed_adapter_is_small_and_of_the_committed_program() -> None:
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size < 27_000
    assert Provenance.read(ADAPTER).program_sha256 == sha256(COMMITTED.program)


def test_committed_adapter_passes_verification(without_extras: Run) -> None:
    run = Run(without_extras.recipe, COMMITTED, without_extras.context)
    (parity,) = verify(run, [ADAPTER], save=False)
    assert parity.passed, parity.reasons
