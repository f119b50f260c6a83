"""Base and steered model run once for all runs of a user; what is kept is believed of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_steer.models import generate, kept_passes, logprobs, shared_blocks
from compile_steer.models.logprobs import final_states
from compile_steer.models.reload import reload
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference
from compile_steer.verification.stage import verify_artifact
from tests.helpers.verification import PROGRAM_HASH, VerifierCase, behaviour, make_reference

PROBE = 2  # passes that say whether base and steered model are as they were
SETTINGS: dict[str, Any] = {"prompts_per_set": 2, "long": 1, "long_tokens": 100, "free_tokens": 4, "capability": 2}


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache of its own."""
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "passes"


@pytest.fixture
def count(case: VerifierCase, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many batches were run or continued, and models compared, since this was asked last."""
    generate._traits(case.base)  # measured once for a model
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        own = getattr(module, name)

        def run(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return own(*args, **options)

        monkeypatch.setattr(module, name, run)

    counted(shared_blocks, "_run")
    counted(generate, "_generate")
    counted(logprobs, "divergence")

    def since() -> int:
        n = len(calls)
        calls.clear()
        return n

    return since


def reference_of(case: VerifierCase, **changes: Any) -> Reference:
    return make_reference(case.base, case.program, **{**SETTINGS, **changes})


def report(parity: Parity) -> dict[str, Any]:
    return {**asdict(parity), "settings": None}


def test_a_second_run_computes_nothing_of_base_and_steered_model_and_reports_the_same(
    case: VerifierCase, passes: Path, count: Callable[[], int]
) -> None:
    folder = case.adapter()
    first = reference_of(case)
    assert count() > PROBE
    before = verify_artifact(first, folder, PROGRAM_HASH)
    first.keep()
    count()
    second = reference_of(case)
    assert count() == PROBE and second.model.kept is not None and second.model.kept.found
    after = verify_artifact(second, folder, PROGRAM_HASH)
    assert report(after) == report(before) and not before.passed
    assert count() > 0, "the artifact is run each time"
    assert len(list(passes.iterdir())) == 1


@pytest.mark.parametrize("changes", [{"free_tokens": 5}, {"heldout": 9}, {"max_new_tokens": 7}, {"capability": 3}])
def test_what_was_asked_otherwise_is_run(
    case: VerifierCase, passes: Path, count: Callable[[], int], changes: dict[str, Any]
) -> None:
    reference_of(case)
    whole = count()
    data = behaviour(heldout=(*behaviour().heldout, replace(behaviour().heldout[0], prompt="w11 w12")))
    make_reference(case.base, case.program, data, **{**SETTINGS, **changes})
    assert PROBE < count() < whole + 2


def test_another_program_model_or_code_has_a_file_of_its_own(
    case: VerifierCase, passes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_of(case)
    for number, program in enumerate([case.program.scaled(1.01), case.program], start=2):
        if number == 3:
            monkeypatch.setattr(kept_passes, "_code", lambda: "changed")
        made = make_reference(case.base, program, **SETTINGS)
        assert made.model.kept is not None and not made.model.kept.found
        assert len(list(passes.iterdir())) == number
    other = replace(case.base, revision=case.base.revision.replace("sha256:", "sha256:0"))
    assert not kept_passes.KeptPasses(other, case.program).found
    unknown = kept_passes.KeptPasses(replace(case.base, revision=""), case.program)
    assert unknown.path is None and unknown.save() == ""


@pytest.mark.parametrize("where", ["module", "head"])
def test_weights_that_were_edited_in_memory_are_run(
    case: VerifierCase, passes: Path, count: Callable[[], int], where: str
) -> None:
    kl = reference_of(case).kl_base.mean
    whole, head = count(), case.base.model.get_output_embeddings()
    weight = head.weight if where == "head" else case.base.model.get_submodule(case.module).weight
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        edited = reference_of(case)
        assert count() == whole and edited.kl_base.mean != kl
    finally:
        with torch.no_grad():
            weight.div_(1.01)
    assert reference_of(case).kl_base.mean == pytest.approx(kl, rel=1e-5)
    assert count() == whole, "what the edited model gave is not the base's"


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_made_again(
    case: VerifierCase, passes: Path, count: Callable[[], int], content: bytes | None
) -> None:
    reference_of(case)
    whole, (file,) = count(), passes.iterdir()
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    reference_of(case)
    assert count() == whole
    reference_of(case)
    assert count() == PROBE


def test_without_a_place_nothing_is_kept_and_that_is_said(
    case: VerifierCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "file"))
    kept = reference_of(case).model.kept
    assert kept is not None and str(tmp_path / "file") in kept.save()
    monkeypatch.setenv("COMPILE_STEER_CACHE", "~nobody-of-this-name/cache")
    kept = reference_of(case).model.kept
    assert kept is not None and kept.path is None and kept.save() == ""


def test_what_was_used_longest_ago_is_removed(
    case: VerifierCase, passes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, programs = set(), [case.program, case.program.scaled(1.01), case.program.scaled(1.02)]
    for program in programs[:2]:
        make_reference(case.base, program, **SETTINGS)
        sizes |= {file.stat().st_size for file in passes.iterdir()}
    files = {number: kept_passes.KeptPasses(case.base, program).path for number, program in enumerate(programs)}
    monkeypatch.setattr(kept_passes, "LARGEST", int(2.5 * max(sizes)))
    reference_of(case)  # used again
    make_reference(case.base, programs[2], **SETTINGS)
    assert {number for number, file in files.items() if file is not None and file.is_file()} == {0, 2}
    monkeypatch.setattr(kept_passes, "LARGEST", 1000)
    kept = reference_of(case).model.kept
    assert kept is not None and "more than" in kept.save()


def test_an_artifact_is_never_given_what_is_kept_of_the_base(case: VerifierCase, passes: Path) -> None:
    reference = reference_of(case)
    artifact = replace(reload(case.adapter("other"), case.base), kept=reference.model.kept)
    own = final_states(artifact, reference.heldout).response
    assert not torch.equal(own, reference.states.base.response)
    assert torch.equal(final_states(reference.model, reference.heldout).response, reference.states.base.response)
