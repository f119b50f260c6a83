"""Whatever a user gets wrong ends in a message, exit code 2, no traceback and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compile_steer.__main__ import main
from compile_steer.artifacts.files import save_record, without_check
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from tests.end_to_end.conftest import RECIPE, ROOT, FinishedRun, command

Refusal = Callable[..., str]


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Run the command line in this process; returns the exit code and what went to standard error."""
    monkeypatch.setattr(sys, "argv", ["compile-steer", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr()
    assert "Traceback" not in output.err + output.out
    return int(stopped.value.code or 0), output.err


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".writing-*")]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refusal:
    def run(*arguments: str | Path) -> str:
        code, message = call(capsys, monkeypatch, *arguments, "--out", tmp_path / "out")
        assert code == 2, message
        assert not leftovers(tmp_path)
        return message

    return run


def test_every_misspelt_key_is_named_with_the_likely_spelling(refusal: Refusal) -> None:
    message = refusal(
        "extract", RECIPE, "--set", "extract.methd=pca", "--set", "verify.gate.share=0.1", "--set", "seed=x"
    )
    assert "did you mean 'method'?" in message and "did you mean 'gates'?" in message and "seed: found 'x'" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("validate.layers=[12,30]", "30 not in this model, which has blocks 0 to 29"),
        ("extract.point=resid_mid", "resid_mid"),
        ("model=./nowhere", "no such folder"),
        ("model=nowhere.gguf", "no such file"),
        ("device=cuda:7", "cannot be used here"),
        ("data.test=data/ocean/train.jsonl", "must not overlap"),
        ("data.train=data/nothing.jsonl", "cannot be read"),
        ("extract.readout=last_prompt", "positive_template"),
        ("extract.pairs=500", "found 60 pairs in data.train"),
        ("validate.coefficients=[0]", "steers nothing"),
        ("validate.positions=everywhere", "everywhere unknown"),
    ],
)
def test_unusable_setting_is_refused_with_its_reason(refusal: Refusal, change: str, words: str) -> None:
    assert words in refusal("validate", RECIPE, "--set", change)


def test_empty_and_broken_data_are_refused_by_file_and_line(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "positive": "b"}\nnot json\n')
    message = refusal(
        "extract",
        RECIPE,
        "--set",
        f"data.train={tmp_path / 'empty.jsonl'}",
        "--set",
        f"data.test={tmp_path / 'broken.jsonl'}",
    )
    assert "empty.jsonl is empty" in message and "broken.jsonl:1" in message and "broken.jsonl:2: not JSON" in message


def test_missing_hub_model_is_refused_with_the_way_to_get_one(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal("extract", RECIPE, "--set", "model=nobody/has-this-model")
    assert "hf download" in message and "smollm2-135m-instruct" in message


@pytest.mark.parametrize("spoil", ["truncated", "foreign", "other width", "other model", "missing"])
def test_program_of_another_model_or_width_is_refused(
    finished: FinishedRun,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spoil: str,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out / "vectors", out / "vectors")
    path = out / "vectors" / "ocean.safetensors"
    program = Program.load(path)
    if spoil == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "foreign":
        shutil.copy(finished.out / "adapters/ocean-closed_form/adapter_model.safetensors", path)
    elif spoil == "missing":
        path.unlink()
    elif spoil == "other width":
        Program((Intervention(Site(12), "add", torch.ones(768), 2.0),), program.model, program.revision).save(path)
    else:
        Program(program.interventions, "another/model", "hub:123").save(path)
    code, message = call(capsys, monkeypatch, "compile", finished.recipe, "--out", out)
    expected = {"truncated": "damaged", "foreign": "no 'program' in its metadata", "missing": "does not exist",
                "other width": "width 768", "other model": "another/model"}  # fmt: skip
    assert code == 2 and expected[spoil] in message
    assert not (out / "adapters").exists()


def test_damaged_adapter_is_refused_and_left_as_it_is(
    finished: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished.out / "vectors", tmp_path / "vectors")
    adapter = tmp_path / "adapters" / "ocean-closed_form"
    shutil.copytree(finished.out / "adapters" / "ocean-closed_form", adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = weights.read_bytes()
    code, message = call(capsys, monkeypatch, "verify", finished.recipe, "--out", tmp_path, "--artifact", adapter)
    assert code == 2 and "ocean-closed_form" in message
    assert weights.read_bytes() == before


def test_compile_after_a_failed_validation_needs_force_and_is_recorded(
    finished: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(finished.out / "vectors", tmp_path / "vectors")
    report = tmp_path / "vectors" / "ocean.validation.json"
    content = json.loads(report.read_text())
    save_record(report, {**without_check(content), "verdict": "fail", "reasons": ["a random direction does as well"]})
    arguments = ("compile", finished.recipe, "--set", "compile.backends=[bias]", "--out", tmp_path)
    code, message = call(capsys, monkeypatch, *arguments)
    assert code == 2 and "validation failed: a random direction" in message
    code, message = call(capsys, monkeypatch, *arguments, "--force")
    assert code == 0, message
    origin = json.loads((tmp_path / "adapters/ocean-bias/compile_steer.json").read_text())
    assert origin["forced"] is True and origin["verdict"] == "fail"
    assert "in spite of it" in (tmp_path / "adapters/ocean-bias/README.md").read_text()


def test_output_folder_that_cannot_be_written_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A file where a folder must be: what a read-only place is to every user, root included.
    (tmp_path / "out").write_text("in the way")
    code, message = call(capsys, monkeypatch, "extract", RECIPE, "--out", tmp_path / "out", "--set", "extract.pairs=4")
    assert code == 2 and "cannot be written to" in message and "another output folder" in message


def test_full_disk_leaves_no_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device", "ocean.directions.safetensors")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    code, message = call(capsys, monkeypatch, "extract", RECIPE, "--out", tmp_path, "--set", "extract.pairs=4")
    assert code == 2 and "No space left on device" in message
    assert list(tmp_path.rglob("*.safetensors")) == [] and not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_run_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        command("validate", RECIPE, "--out", tmp_path, "--set", "extract.pairs=8"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    directions = tmp_path / "vectors" / "ocean.directions.safetensors"
    while not directions.exists():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    os.kill(process.pid, number)
    _out, message = process.communicate()
    if number == signal.SIGINT:
        assert process.returncode == 130 and "stopped" in message and "Traceback" not in message
    # A killed process leaves its lock, which nobody holds any more.
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != ".compile_steer.lock"]
    assert left == ["ocean.directions.safetensors"]
