"""Fingerprints: an artifact on disk computes what the compiler had in memory, closer than the gates ask."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.faults import OF_THE_FILE
from compile_steer.artifacts.provenance import Provenance
from compile_steer.export.adapter import read_patch
from compile_steer.export.merged import write_merged
from compile_steer.models.fingerprint import REFERENCE_TEXTS, fingerprint, reference_logprobs, reference_tokens
from compile_steer.models.reload import fresh_copy
from tests.helpers import planted
from tests.helpers.tiny import loaded
from tests.helpers.verification import VerifierCase

REASON = f"{OF_THE_FILE}: mean log p of a fixed text is "


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    made = VerifierCase.of(tmp_path_factory.mktemp("scene"), prompts_per_set=2, long=0, free_tokens=4)
    adapter = made.adapter()
    origin = replace(Provenance.read(adapter), form="merged-fp32")
    write_merged(made.folder / "sum", read_patch(adapter), made.base, "fp32", origin, "")
    return made


def spoiled(scene: VerifierCase, plant: planted.Plant, name: str, to: Path) -> Path:
    shutil.copytree(scene.folder / name, to)
    planted.plant(plant, to, Path(scene.base.source))
    return to


@pytest.mark.parametrize("name", ["adapter", "sum"])
def test_files_compute_what_the_patch_did_in_memory(scene: VerifierCase, name: str) -> None:
    parity = scene.parity_of(scene.folder / name)
    assert parity.file_error is not None and parity.file_error < 1e-6
    assert not any(REASON in reason for reason in parity.reasons)


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (planted.scaled(1.01), "adapter"),
        (planted.rank_cut, "adapter"),
        (planted.times_merged(1.01), "sum"),
    ],
)
def test_a_fault_of_one_hundredth_is_seen(scene: VerifierCase, tmp_path: Path, plant: planted.Plant, name: str) -> None:
    parity = scene.parity_of(spoiled(scene, plant, name, tmp_path / "it"))
    assert parity.file_error is not None and parity.file_error > 1e-4
    assert sum(reason.startswith(REASON) for reason in parity.reasons) == 1 and not parity.passed


def test_where_nothing_was_recorded_nothing_is_compared(scene: VerifierCase, tmp_path: Path) -> None:
    folder = spoiled(scene, planted.scaled(1.01), "adapter", tmp_path / "it")
    replace(Provenance.read(folder), fingerprint=[]).write(folder)
    assert scene.parity_of(folder).file_error is None


def test_a_fingerprint_is_the_mean_log_probability_of_each_text(scene: VerifierCase) -> None:
    values = fingerprint(scene.base.model, scene.base)
    assert len(values) == len(REFERENCE_TEXTS)
    for ids, value in zip(reference_tokens(scene.base), values, strict=True):
        tokens = torch.tensor([ids[:32]])
        loss = scene.base.model(input_ids=tokens, labels=tokens).loss
        assert value == pytest.approx(-float(loss), rel=1e-5)
    assert reference_logprobs(scene.base.model, [[7, 8, 9], [9, 8]]).shape == (3,)


def test_a_model_in_half_precision_has_none(scene: VerifierCase) -> None:
    assert fingerprint(fresh_copy(scene.base).model.bfloat16(), scene.base) == []


def test_the_smallest_context_has_room() -> None:
    plain = loaded("gpt2")
    assert len(fingerprint(plain.model, plain)) == len(REFERENCE_TEXTS)
