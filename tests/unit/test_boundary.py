"""However a command ends, the screen gets a short message and the shell the right exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign.attacks import modules_that_ran, plant_modules
from compile_steer.__main__ import main
from compile_steer.common.errors import ArtifactError, InternalError, RecipeError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "compile_steer"]
_OutOfMemory = type("OutOfMemoryError", (RuntimeError,), {})


def _raising(error: BaseException) -> Callable[..., Any]:
    def app(**_options: object) -> Any:
        raise error

    return app


def _recursing(**_options: object) -> Any:
    return _recursing()


def _library_that_catches_everything(**_options: object) -> Any:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        raise ImportError("numpy failed to load") from error


def _head(**_options: object) -> Any:
    try:
        raise BrokenPipeError(32, "Broken pipe")
    except BrokenPipeError:
        raise SystemExit(1) from None  # what rich and typer make of it


@pytest.mark.parametrize(
    ("app", "code", "words"),
    [
        (lambda **_options: None, 0, ""),
        (lambda **_options: 1, 1, ""),  # what the library returns for typer.Exit(1)
        (_raising(RecipeError(["one", "two"])), 2, "error: one\nerror: two\n"),
        (_raising(ArtifactError([f"row {n}" for n in range(10_000)])), 2, "9950 more problems"),
        (
            _raising(ArtifactError("\x1b]0;owned\x07 [red]x[/]\r\u202e")),
            2,
            r"error: \x1b]0;owned\x07 [red]x[/]\r\u202e",
        ),
        (_raising(KeyboardInterrupt()), 130, "stopped"),
        (_library_that_catches_everything, 130, "stopped"),
        (_raising(MemoryError()), 2, "not enough memory"),
        (_raising(_OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB")), 2, "not enough memory"),
        (_raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), 2, "not enough memory"),
        (_raising(OSError(28, "No space left on device", "x.json")), 2, "No space left on device (x.json)"),
        (_raising(PermissionError(13, "Permission denied", "x")), 2, "Permission denied (x)"),
        (_head, 2, ""),
        (_raising(BrokenPipeError(32, "Broken pipe")), 2, ""),
        (_raising(SystemExit(1)), 3, "SystemExit"),
        (_raising(SystemExit("bye")), 3, "SystemExit: 'bye'"),
        (
            _raising(InternalError("the verification left no report.")),
            3,
            "error: the verification left no report. This is",
        ),
        (_raising(KeyError("layer")), 3, "KeyError"),
        (_raising(ZeroDivisionError("\x1b[31m" * 1000)), 3, r"ZeroDivisionError: '\x1b[31m"),
        (_raising(type("PanicException", (BaseException,), {})("rust")), 3, "PanicException"),
        (_recursing, 3, "RecursionError"),
    ],
)
def test_exit_code_and_message(
    app: Callable[..., Any],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("compile_steer.__main__._stops", [])
    monkeypatch.setattr("compile_steer.cli.app.app", app)
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == code and words in err and bool(words) == bool(err)
    assert "Traceback" not in err and len(err) < 4000
    logs = list(tmp_path.glob("compile-steer-*.log"))
    assert len(logs) == (code == 3)
    if logs:
        assert str(logs[0]) in err and "Traceback" in logs[0].read_text()


def test_log_that_cannot_be_kept_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr("compile_steer.__main__._stops", [])
    monkeypatch.setattr("compile_steer.cli.app.app", _raising(KeyError("layer")))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 3 and "could not be kept (No such file or directory; TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "x.yaml", "--nope"], "No such option"),
        (["run", "x.yaml", "--seed", "z"], "Invalid value for '--seed'"),
        (["export", "x", "--for", "\x1b[31m", "--out", "y"], "Invalid value for '--for'"),
        (["run", "x.yaml", "\x1b]0;owned\x07"], "unexpected extra argument"),
        (["run", "x.yaml", "--out"], "requires an argument"),
    ],
)
def test_usage_errors_have_our_form(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["compile-steer", *arguments])
    monkeypatch.setattr("compile_steer.__main__._stops", [])
    with pytest.raises(SystemExit) as stopped:
        main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and words in err and "--help'." in err
    assert err.count("\n") == 1 and "\x1b" not in err


def _shell(line: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line, "bash", *COMMAND], check=False, cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('"$@" glossary | true; exit ${PIPESTATUS[0]}', 2),
        ('"$@" glossary >&-', 0),
        ('"$@" glossary >&- 2>&- <&-', 0),
        ('"$@" glossary nothing 2>&-', 2),
        ('PYTHONIOENCODING=ascii "$@" glossary >/dev/null', 0),
    ],
)
def test_streams_that_are_closed_early(line: str, code: int) -> None:
    done = _shell(line)
    assert done.returncode == code, done.stderr
    assert done.stderr == ""


def test_full_disk_under_standard_output(tmp_path: Path) -> None:
    done = _shell('ulimit -f 1; "$@" --help > help.txt', tmp_path)
    assert done.returncode == 2 and "error: File too large" in done.stderr and done.stderr.count("\n") == 1


def _catches(number: signal.Signals, process: int) -> bool:
    """Whether the process has a handler for that signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    assert caught is not None
    return int(caught[1], 16) >> (number - 1) & 1 == 1


@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGINT, 0.02), (signal.SIGTERM, 0.06), (signal.SIGHUP, 0.1), (signal.SIGINT, 0.25)]
)
def test_stop_at_any_moment_of_the_start_prints_no_traceback(number: signal.Signals, delay: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, "audit", "nothing", "nothing"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not _catches(signal.SIGTERM, process.pid):
        time.sleep(0.002)  # before our handlers stand, Python's own are at work
    time.sleep(delay)
    process.send_signal(number)
    _out, err = process.communicate()
    assert process.returncode == 128 + number and err.startswith("error: stopped") and err.count("\n") == 1, err


def test_telling_of_a_stop_imports_no_extension_whose_import_the_stop_may_have_interrupted() -> None:
    program = "import sys; from compile_steer.__main__ import _end, _Stopped; _end(_Stopped()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("error: stopped")
    assert not {"_decimal", "pydantic_core", "torch"} & set(done.stdout.split())


def test_modules_of_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    plant_modules(tmp_path)
    done = _shell('"$@" show missing.safetensors', tmp_path)
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert modules_that_ran(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [["run", ""], ["run", "a.yaml", "--out", ""], ["run", "a.yaml", "--out="], ["show", ""]]
)
def test_an_empty_argument_is_refused_because_a_path_without_a_name_is_the_current_folder(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compile-steer", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and "error: an argument is empty" in capsys.readouterr().err


def test_a_name_with_a_line_break_is_no_message_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compile-steer", "show", "a\nerror: b"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: a\\nerror: b ")


def test_a_process_that_another_command_started_leaves_it_to_say_that_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compile_steer.__main__._stops", [])
    monkeypatch.setattr("compile_steer.cli.app.app", _raising(KeyboardInterrupt()))
    monkeypatch.setenv("COMPILE_STEER_LOCK", "")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and capsys.readouterr().err == ""
