"""What is certified is what was measured: files that change meanwhile, reports of another run, checks that were not made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile_steer.artifacts.contents import file_hashes, unchanged
from compile_steer.artifacts.provenance import PARITY, Provenance, weights_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.models.reload import reload
from compile_steer.models.source import revision_of
from compile_steer.pipeline import artifacts as pipeline
from compile_steer.pipeline.stages import require_of_this_run
from compile_steer.verification.gates import judged
from compile_steer.verification.options import Gates
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun
from tests.helpers.verification import VerifierCase


def put_back(path: Path) -> None:
    """Change a file and restore it with its times, as `cp -p` would."""
    content, state = path.read_bytes(), path.stat()
    path.write_bytes(b"another")
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a byte": lambda folder: (folder / "weights").write_bytes(b"other"),
    "put back": lambda folder: put_back(folder / "weights"),
    "another file": lambda folder: (folder / "more").touch(),
    "a linked folder": lambda folder: (folder / "linked").symlink_to(folder.parent),
    "a link to nothing": lambda folder: (folder / "nothing").symlink_to("nowhere"),
    "deleted": lambda folder: (folder / "weights").unlink(),
    "the folder": shutil.rmtree,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_while_it_is_used_is_noticed(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "weights").write_bytes(b"weights")
    with pytest.raises(ArtifactError, match="changed while it was measured"), unchanged(folder):
        CHANGES[change](folder)


def test_reports_about_a_folder_and_hidden_files_may_change_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    with unchanged(tmp_path, without=("README.md",)) as hashes:
        (tmp_path / "README.md").touch()
        (tmp_path / ".lock").touch()
    assert hashes == file_hashes(tmp_path, without=("README.md",))
    with unchanged(tmp_path / "weights") as hashes:
        assert list(hashes) == [""]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    made = VerifierCase.of(tmp_path_factory.mktemp("case"), prompts_per_set=2, long=0, free_tokens=4)
    made.adapter()
    return made


@pytest.mark.parametrize("change", ["a byte", "put back"])
def test_an_artifact_that_is_written_to_while_it_is_measured_gets_no_verdict(
    case: VerifierCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(case.folder / "adapter", folder)
    weights = folder / "adapter_model.safetensors"

    def reload_then_change(*arguments: Any) -> Any:
        loaded = reload(*arguments)
        put_back(weights) if change == "put back" else weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        return loaded

    monkeypatch.setattr("compile_steer.verification.stage.reload", reload_then_change)
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors changed while it was measured"):
        case.parity_of(folder)


def test_the_report_names_the_files_that_were_loaded_and_how_they_were_measured(case: VerifierCase) -> None:
    parity = case.parity_of(case.folder / "adapter")
    assert parity.sha256["artifact"] == weights_sha256(case.folder / "adapter")
    assert parity.settings["seed"] == 3 and parity.settings["verify"]["free_tokens"] == 4
    gates = Gates.model_validate(parity.settings["verify"]["gates"])
    assert parity.checks == judged(parity, gates).checks, (
        "the verdict follows from the figures and gates of the report alone"
    )
    outcomes = {check.name: check.outcome for check in parity.checks}
    assert outcomes["on disk"] == "passed" and outcomes["capability"] == "not checked"
    assert parity.verdict.startswith("FAILED; not checked: contexts, KL in other wordings, score, capability")


NOT_CHECKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no fingerprint": ({"fingerprint": []}, "on disk", "recorded no log p"),
    "fewer texts": ({"fingerprint": [-1.0, -2.0]}, "on disk", "of 2 texts, this version reads 8"),
    "bf16": ({"form": "merged-bf16"}, "on disk", "merged-bf16 stores fewer bits"),
}


@pytest.mark.parametrize("name", NOT_CHECKED)
def test_a_check_that_could_not_be_made_is_said(case: VerifierCase, tmp_path: Path, name: str) -> None:
    changes, check, reason = NOT_CHECKED[name]
    folder = tmp_path / "it"
    shutil.copytree(case.folder / "adapter", folder)
    replace(Provenance.read(folder), **changes).write(folder)
    parity = case.parity_of(folder)
    assert parity.file_error is None
    (unmade,) = [one for one in parity.unchecked if one.name == check]
    assert reason in unmade.text and check in parity.verdict


def test_a_record_without_the_hashes_of_its_files_is_said(case: VerifierCase, tmp_path: Path) -> None:
    from compile_steer.artifacts.files import save_record

    folder = tmp_path / "it"
    shutil.copytree(case.folder / "adapter", folder)
    save_record(folder / "compile_steer.json", {**vars(Provenance.read(folder)), "files_sha256": {}})
    assert "files" in [check.name for check in case.parity_of(folder).unchecked]


# ------------------------------------------------------------------------------------------ the run


def test_reports_are_bound_to_recipe_data_base_and_libraries(run: SmallRun) -> None:
    opened, folder = run.open(), run.paths.merged("bias", "fp32")
    parity = Parity.load(folder / PARITY)
    assert parity.sha256 == {
        **opened.bonds,
        "artifact": weights_sha256(folder),
        "program": opened.program_sha256,
        "base": opened.model.revision,
        "texts": parity.sha256["texts"],
    }


def test_a_report_is_of_an_older_artifact_whose_record_names_the_base_by_its_tensors_alone(run: SmallRun) -> None:
    folder = run.paths.merged("bias", "fp32")
    parity, origin = Parity.load(folder / PARITY), Provenance.read(folder)
    for revision, same in ((origin.revision.partition("+")[0], True), ("sha256:other", False)):
        older = replace(origin, revision=revision)
        assert all(found == needed for _what, found, needed in parity.bonds(folder, older)) is same


@pytest.mark.parametrize("key", ["recipe", "data", "versions", "artifact", "program", "base"])
def test_a_run_takes_no_report_of_anything_else(run: SmallRun, key: str) -> None:
    opened = run.open()
    base = Parity.load(run.paths.merged("bias", "fp32") / PARITY)
    reports = [
        replace(base, sha256={**base.sha256, "artifact": weights_sha256(folder)})
        for folder in pipeline.artifacts(opened)
    ]
    require_of_this_run(opened, reports)
    with pytest.raises(ArtifactError, match=f"not what this run made: {key} changed"):
        require_of_this_run(opened, [*reports[:-1], replace(base, sha256={**reports[-1].sha256, key: "other"})])
    with pytest.raises(ArtifactError, match="not what this run made"):
        require_of_this_run(opened, reports[:-1])


def test_a_base_or_program_that_changes_meanwhile_leaves_no_report(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, folder = run.open(), run.paths.merged("bias", "fp32")
    before = (folder / PARITY).read_bytes()
    monkeypatch.setattr("compile_steer.pipeline.run.revision_of", lambda _model: "sha256:other")
    assert opened.program_sha256
    run.paths.program.write_bytes(run.paths.program.read_bytes() + b" ")
    with pytest.raises(ArtifactError) as caught:
        pipeline.verify(opened, [folder])
    assert "changed while it was used: sha256:" in str(caught.value) and "tide.safetensors changed" in str(caught.value)
    assert (folder / PARITY).read_bytes() == before
    assert revision_of(opened.model.source) == opened.model.revision


def test_verifying_on_other_data_than_the_artifact_was_made_from_is_said(run: SmallRun) -> None:
    path = run.root / "recipes" / "data" / "heldout.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("w1", "w2"), encoding="utf-8")
    (parity,) = pipeline.verify(run.open(), [run.paths.merged("bias", "fp32")], save=False)
    assert "its own data" in parity.verdict and "heldout changed since" in parity.unmeasured["its own data"]


def test_what_another_version_computed_is_made_again(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = run.open()
    before = opened.validate().inputs
    monkeypatch.setattr("compile_steer.pipeline.run.versions", lambda: {"compile_steer": "0.0.9"})
    assert opened.validate().inputs != before
