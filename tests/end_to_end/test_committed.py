"""The examples in vectors/ and adapters/ are judged again, as anybody can."""

from __future__ import annotations

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.progress import Progress
from compile_steer.pipeline.artifacts import verify
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from compile_steer.steering.program import Program
from compile_steer.validation.report import ValidationReport
from tests.end_to_end.conftest import RECIPE, ROOT, SMALL

PLACES = RunPaths(ROOT, "ocean")
ADAPTER = PLACES.adapter("closed_form")


def test_the_committed_vector_is_the_one_that_was_validated() -> None:
    report = ValidationReport.load(PLACES.validation)
    assert report.verdict == "pass"
    assert report.program_hash == sha256(PLACES.program)
    (intervention,) = Program.load(PLACES.program).interventions
    assert (intervention.site.layer, intervention.coefficient) == (report.layer, report.coefficient)


def test_the_committed_adapter_is_small_and_of_that_vector() -> None:
    assert (ADAPTER / "adapter_model.safetensors").stat().st_size < 25_000
    assert Provenance.read(ADAPTER).program_sha256 == sha256(PLACES.program)


def test_the_committed_adapter_passes_the_judge() -> None:
    (parity,) = verify(Run.open(read_recipe(RECIPE, SMALL), ROOT, Progress()), [ADAPTER], save=False)
    assert parity.passed, parity.reasons
