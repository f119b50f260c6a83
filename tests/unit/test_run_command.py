"""What `compile-steer run` prints, and what it does when a process of its own fails."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from compile_steer.__main__ import main
from compile_steer.artifacts.provenance import CARD, PARITY
from compile_steer.common.errors import ArtifactError, InternalError
from compile_steer.pipeline import artifacts
from compile_steer.pipeline.stages import kept_parities, run_stages, verify_in_fresh_process
from tests.helpers.small_run import SmallRun


def test_run_with_json_prints_nothing_but_json_on_standard_output(run: SmallRun) -> None:
    command = [sys.executable, "-m", "compile_steer", "run", str(run.recipe), "--out", str(run.paths.out), "--json"]
    process = subprocess.run([*command, "--force", "--verbose"], capture_output=True, text=True, check=False)
    assert process.returncode in (0, 1), process.stderr
    summary = json.loads(process.stdout)
    reports = {(parity["backend"], parity["form"]) for parity in summary["parities"]}
    assert reports == {("bias", "merged-fp32"), ("closed_form", "adapter"), ("closed_form", "merged-fp32")}
    shipped = summary["recommendation"]
    passed = [f"{parity['backend']} {parity['form']}" for parity in summary["parities"] if parity["passed"]]
    failed_validation = summary["validation"]["verdict"] == "fail"
    assert shipped["artifact"] in (passed if passed and not failed_validation else [""])
    ship = run.paths.report.read_text(encoding="utf-8").partition("<h3>Ship</h3>")[2]
    assert f'">{shipped["artifact"] or "None"}</p>' in ship
    assert process.returncode == (0 if all(parity["passed"] for parity in summary["parities"]) else 1)
    assert "verifying artifacts from disk" in process.stderr  # the progress of the process that verifies


@pytest.mark.parametrize(
    ("code", "output", "error"),
    [
        (1, b"", InternalError),  # Python's own exit code for a traceback
        (1, b"Traceback (most recent call last):", InternalError),
        (-9, b"", InternalError),
        (3, b"", InternalError),
        (2, b"", ArtifactError),
    ],
)
def test_a_verification_that_crashed_is_no_failed_check(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, code: int, output: bytes, error: type[Exception]
) -> None:
    assert (run.paths.adapter("closed_form") / PARITY).is_file()  # the report of an earlier run, which must not be read

    def crash(command: list[str], **_options: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, code, output)

    monkeypatch.setattr(subprocess, "run", crash)
    with pytest.raises(error, match="verif"):
        verify_in_fresh_process(run.recipe, run.paths.out, [])


def test_a_finished_run_keeps_its_reports_while_they_are_of_these_very_files(run: SmallRun) -> None:
    opened = run.open()
    folders = artifacts.artifacts(opened)
    assert kept_parities(opened) is None  # one was never verified
    reports = artifacts.verify(opened, folders)
    assert kept_parities(opened) == reports
    card = folders[-1] / CARD
    sound = card.read_bytes()
    card.write_text("of before the report", encoding="utf-8")  # what a kill between the two leaves
    *_, ended = run_stages(opened, run.recipe, [], force=True)
    assert ended.parities == reports and card.read_bytes() == sound
    path = folders[0] / PARITY
    for forged in (replace(reports[0], passed=not reports[0].passed), replace(reports[0], sha256={})):
        forged.save(path)  # with a new seal
        assert kept_parities(opened) is None
    reports[0].save(path)
    weights = folders[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert kept_parities(opened) is None


def test_a_renamed_recipe_key_is_answered_with_its_new_name(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["compile-steer", "extract", str(run.recipe), "--set", "data.write={tries: 2}"])
        main()
    assert stopped.value.code == 2
    assert "data.write: is now called data.generate" in capsys.readouterr().err.replace(
        "data.pairs.write", "data.write"
    )
