"""The judge's own power on the real model: every planted fault is caught, an exact compile never flagged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.provenance import Provenance
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.export.merged import write_merged
from compile_steer.pipeline.artifacts import make_reference
from compile_steer.pipeline.run import Run
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.end_to_end.conftest import Walk

Fault = Callable[[WeightPatch], WeightPatch]


def scaled(factor: float) -> Fault:
    def fault(patch: WeightPatch) -> WeightPatch:
        return replace(
            patch,
            low_rank={name: LowRank(factor * edit.B, edit.A) for name, edit in patch.low_rank.items()},
            bias={name: factor * bias for name, bias in patch.bias.items()},
        )

    return fault


def moved(blocks: int) -> Fault:
    """The same edits, each some blocks further on."""

    def rename(name: str) -> str:
        head, number, tail = name.split(".", 3)[:2], name.split(".", 3)[2], name.split(".", 3)[3]
        return ".".join([*head, str(int(number) + blocks), tail])

    def fault(patch: WeightPatch) -> WeightPatch:
        return replace(
            patch,
            low_rank={rename(name): edit for name, edit in patch.low_rank.items()},
            bias={rename(name): bias for name, bias in patch.bias.items()},
        )

    return fault


FAULTS: dict[str, Fault] = {
    "sign flipped": scaled(-1.0),
    "one block late": moved(1),
    "one block early": moved(-1),
    "coefficient x1.1": scaled(1.1),
    "coefficient x0.9": scaled(0.9),
    "dropped": scaled(0.0),
    "merged twice": scaled(2.0),
}


@pytest.fixture(scope="module")
def core(opened: Run) -> Run:
    """The walk's run without long prompts and questions: the other gates must do."""
    verify = opened.recipe.verify.model_copy(update={"long": 0, "capability": 0})
    return replace(opened, recipe=opened.recipe.model_copy(update={"verify": verify}))


@pytest.fixture(scope="module")
def reference(core: Run) -> Reference:
    return make_reference(core)


def judged(opened: Run, reference: Reference, folder: Path) -> Parity:
    return verify_artifact(reference, folder, sha256(opened.paths.program))


def faulty_bias(opened: Run, fault: Fault, folder: Path) -> Path:
    source = opened.paths.adapter("bias")
    origin = replace(Provenance.read(source), form="merged-fp32")
    write_merged(folder, fault(read_patch(source)), opened.model, "fp32", origin, "")
    return folder


def faulty_adapter(opened: Run, fault: Fault, folder: Path) -> Path:
    source = opened.paths.adapter("closed_form")
    write_patch(folder, fault(read_patch(source)), opened.model, Provenance.read(source), "")
    return folder


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("one block early", "coefficient x0.9")])
def test_a_faulty_bias_is_caught(walk: Walk, opened: Run, reference: Reference, tmp_path: Path, name: str) -> None:
    parity = judged(opened, reference, faulty_bias(opened, FAULTS[name], tmp_path / "faulty"))
    assert not parity.passed and parity.reasons, name


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("one block late", "coefficient x1.1")])
def test_a_faulty_adapter_is_caught(walk: Walk, opened: Run, reference: Reference, tmp_path: Path, name: str) -> None:
    parity = judged(opened, reference, faulty_adapter(opened, FAULTS[name], tmp_path / "faulty"))
    assert not parity.passed and parity.reasons, name


def test_the_untouched_adapter_passes_the_same_judge(opened: Run, reference: Reference) -> None:
    assert judged(opened, reference, opened.paths.adapter("closed_form")).reasons == []


def test_the_untouched_bias_passes_it_on_other_texts_too(core: Run) -> None:
    other = replace(core, context=replace(core.context, seed=11))
    fresh = make_reference(other)
    assert judged(other, fresh, core.paths.merged("bias", "fp32")).reasons == []
