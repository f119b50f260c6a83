"""The verifier on the real model: planted faults are caught. That the sound artifacts pass, by more gates, test_run.py shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compile_steer.artifacts.provenance import Provenance
from compile_steer.models.logprobs import final_states
from compile_steer.models.reload import reload
from compile_steer.pipeline.artifacts import make_reference
from compile_steer.pipeline.run import Run
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.helpers import planted

# The smallest of each kind: of an adapter the whole verdict, of a merged model (and the larger ones of an adapter) by the first gate,
# of the KL; its whole verdict is tests/unit/test_planted.py's, on a tiny model. All 31 are in `python -m benchmarks.faults`.
BIAS_FAULTS = {"one block late": planted.merged_elsewhere(1), "coefficient x1.1": planted.times_merged(1.1)}
ADAPTER_FAULTS = {"one block early": planted.moved(-1), "coefficient x0.9": planted.scaled(0.9)}
LARGER_FAULTS = {
    "sign flipped": planted.scaled(-1.0),
    "dropped": planted.scaled(0.0),
    "merged twice": planted.scaled(2.0),
}


@pytest.fixture(scope="module")
def reference(without_extras: Run) -> Reference:
    return make_reference(without_extras)


def verified(run: Run, reference: Reference, folder: Path) -> Parity:
    return verify_artifact(reference, folder, run.program_sha256)


def faulty(run: Run, source: Path, fault: planted.Plant, folder: Path) -> Path:
    """A copy with the fault, and without the record of what the compiler had in memory: the measurements must do."""
    shutil.copytree(source, folder)
    planted.plant(fault, folder, Path(run.model.source))
    replace(Provenance.read(folder), fingerprint=[]).write(folder)
    return folder


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_faulty_adapter_fails(
    without_extras: Run, reference: Reference, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The adapter's controls take half of the time: the other measurements must do.
    monkeypatch.setattr("compile_steer.verification.stage.adapter_controls", lambda *_arguments: None)
    run = without_extras
    folder = faulty(run, run.paths.adapter("closed_form"), ADAPTER_FAULTS[fault], tmp_path / "faulty")
    parity = verified(run, reference, folder)
    assert not parity.passed and parity.reasons


def kl_of(run: Run, reference: Reference, folder: Path) -> float:
    """What the first gate is on, alone."""
    artifact = reload(folder, run.model)
    return reference.kl_from_steered(artifact, final_states(artifact, reference.heldout)).mean


@pytest.mark.parametrize("fault", LARGER_FAULTS)
def test_a_larger_fault_leaves_more_than_the_gate_allows(
    without_extras: Run, reference: Reference, tmp_path: Path, fault: str
) -> None:
    run = without_extras
    folder = faulty(run, run.paths.adapter("closed_form"), LARGER_FAULTS[fault], tmp_path / "faulty")
    left = kl_of(run, reference, folder)
    assert left > reference.options.gates.kl_remaining * reference.kl_base.mean


@pytest.mark.parametrize("fault", BIAS_FAULTS)
def test_a_faulty_bias_leaves_more_than_the_gate_allows(
    without_extras: Run, reference: Reference, tmp_path: Path, fault: str
) -> None:
    run = without_extras
    source = run.paths.merged("bias", "fp32")
    assert kl_of(run, reference, source) <= reference.options.gates.exact_kl
    folder = faulty(run, source, BIAS_FAULTS[fault], tmp_path / "faulty")
    left = kl_of(run, reference, folder)
    shutil.rmtree(folder)  # half a gigabyte
    assert left > reference.options.gates.exact_kl
