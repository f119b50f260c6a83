"""Run a worker script with an engine's own interpreter: a job as JSON and arrays in, JSON and arrays out.

The engines crash, hang and leave processes behind; whatever happens to a worker, here it is an answer or one error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compile_steer.common.errors import EngineError
from compile_steer.tools.serving.environment import Environment

WORKERS = Path(__file__).parent / "workers"
JOB, ARRAYS_IN, ANSWER, ARRAYS_OUT, LOG = "job.json", "in.npz", "out.json", "out.npz", "last-run.log"

_GRACE_S = 5.0  # to leave by itself, and to take its shared memory with it
_SHOWN = 6  # last lines of its log
# Nothing is sent anywhere, nothing is fetched, and no other environment's libraries get in.
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Answer:
    """What a worker left: `told` is JSON, `arrays` by name."""

    told: dict[str, Any]
    arrays: dict[str, np.ndarray[Any, Any]]


def run_worker(
    engine: Environment,
    script: Path,
    job: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    limit_s: float,
) -> Answer:
    """Run `script` with the engine's interpreter, and read what it left.

    The script is given one argument, a folder with job.json and in.npz, and leaves out.json and out.npz there. It and
    all that it started are gone when this returns, also by an error or Ctrl-C. What it printed is kept after a
    failure in last-run.log of the environment.

    Raises:
        EngineError: it crashed, did not end in `limit_s` seconds, or left no answer.
    """
    with tempfile.TemporaryDirectory(prefix="compile-steer-engine-") as name:
        folder = Path(name)
        (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
        np.savez(folder / ARRAYS_IN, allow_pickle=False, **arrays)
        problem = _ended(engine, script, folder, limit_s)
        if not problem:
            try:
                told = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
                with np.load(folder / ARRAYS_OUT) as found:
                    return Answer(told, dict(found))
            except (OSError, ValueError) as error:
                problem = f"ended well, but left no answer that can be read ({error})"
        raise EngineError(f"{engine.name}: {script.stem} {problem}. {_printed(engine, folder / LOG)}")


def _ended(engine: Environment, script: Path, folder: Path, limit_s: float) -> str:
    """Run to the end; returns what went wrong, in words, or ''."""
    command = [str(engine.python), "-I", str(script), str(folder)]
    environ = {**os.environ, **_QUIET}
    with (folder / LOG).open("wb") as log:
        try:
            # A session of its own: what it starts can be ended with it.
            worker = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, start_new_session=True
            )
        except OSError as error:
            return f"cannot be started ({error.strerror}: {engine.python})"
        try:
            code = worker.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end in {limit_s:g} s and was stopped"
        finally:
            _end(worker)
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"failed with exit code {code}" if code else ""


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and everything in its session."""
    with suppress(ProcessLookupError):  # nobody is left: as it should be
        os.killpg(worker.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            worker.wait(_GRACE_S)
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _printed(engine: Environment, log: Path) -> str:
    """The last lines that a worker printed, and where all of them are."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return "It printed nothing."
    with suppress(OSError):  # an environment that cannot be written to still has its say here
        shutil.copy(log, engine.folder / LOG)
    return f"It printed last: {' / '.join(lines[-_SHOWN:])} (all of it in {engine.folder / LOG})"
