"""Commands run in forks of one process that has imported everything: a start takes milliseconds in place of seconds.

A fork runs what `python -m compile_steer` runs, in a process group, folder, and folder for temporary files of its own.
`run_process` is the same with an interpreter of its own: the campaign compares the two on a sample.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import compile_steer
from compile_steer import __main__ as entry
from compile_steer.pipeline import stages
from compile_steer.report import page

GIB = 2**30
STOPPED_AT = 3 * GIB  # where a trial is ended, before it takes the machine with it
POLL = 0.03
# What a library starts threads or goes to the network for; set before anything heavy is imported.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}

_ENCODINGS = tuple(f"encodings.{name}" for name in ("utf_8_sig", "utf_16", "utf_32", "cp1252", "latin_1", "idna"))


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `seconds` are the processor's, `peak` is the resident memory in bytes."""

    code: int  # minus the signal that ended it
    output: str
    errors: str
    seconds: float
    peak: int
    ended: str = ""  # why the trial was ended from outside

    @property
    def last_line(self) -> str:
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def import_everything() -> None:
    """Import the whole package, so that no fork has to."""
    for module in pkgutil.walk_packages(compile_steer.__path__, "compile_steer."):
        if not module.name.startswith("compile_steer.tools.serving.workers"):
            importlib.import_module(module.name)
    # Of the last ones nobody but root may read the files here.
    for name in (
        "peft",
        "matplotlib.pyplot",
        "datasets",
        "transformers.models.llama.modeling_llama",
        "scipy.stats",
        *_ENCODINGS,
    ):
        importlib.import_module(name)


def run(
    arguments: Sequence[str],
    folder: Path,
    prepare: Callable[[], object] = lambda: None,
    *,
    limit: float = 60.0,
    kill_after: float | None = None,
    answers: str = "",
) -> Outcome:
    """Run a command in a fork.

    Args:
        prepare: called in the fork before the command.
        limit: seconds after which it counts as hanging; of the processor's, a third.
        kill_after: seconds after which it is killed, as a trial's purpose.
        answers: its standard input.
    """
    process, files = start(arguments, folder, prepare, answers)
    return wait(process, files, limit, kill_after)


def start(
    arguments: Sequence[str], folder: Path, prepare: Callable[[], object] = lambda: None, answers: str = ""
) -> tuple[int, list[Any]]:
    """Start a command in a fork; returns its process, and the files of its standard output and error."""
    files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  (`wait` closes them)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.setsid()
        _redirect(files[0].fileno(), files[1].fileno(), answers)
        os.chdir(folder)
        _behave_as_command(arguments, prepare)
    return process, files


def wait(process: int, files: list[Any], limit: float = 60.0, kill_after: float | None = None) -> Outcome:
    """Wait for a command that was started; what is left of its group is killed at the end."""
    began, ended = time.monotonic(), ""
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        passed = time.monotonic() - began
        if kill_after is not None and passed >= kill_after:
            _kill_group(process)
        elif passed > limit or _seconds(process) > limit / 3 or _resident(process) > STOPPED_AT:
            ended = f"ended after {passed:.0f} s, at {_resident(process) / GIB:.1f} GiB"
            _kill_group(process)
        time.sleep(POLL)
    _kill_group(process)
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode("utf-8", "replace"))
        file.close()
    code = os.waitstatus_to_exitcode(status)
    output, errors = texts
    return Outcome(code, output, errors, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, ended)


def run_process(arguments: Sequence[str], folder: Path, limit: float = 120.0) -> Outcome:
    """Run a command as a user does, with an interpreter of its own."""
    root = str(Path(compile_steer.__path__[0]).parent)
    environment = {**os.environ, **QUIET, "PYTHONPATH": root}
    command = [sys.executable, "-P", "-m", "compile_steer", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return Outcome(-signal.SIGKILL, "", "", limit, 0, f"ended after {limit:.0f} s")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(done.returncode, done.stdout, done.stderr, seconds, after.ru_maxrss * 1024)


def _redirect(output: int, errors: int, answers: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(answers.encode())
        file.seek(0)
        for target, source in enumerate((file.fileno(), output, errors)):
            os.dup2(source, target)


def _behave_as_command(arguments: Sequence[str], prepare: Callable[[], object] = lambda: None) -> NoReturn:
    """What an interpreter does with `-m compile_steer`."""
    sys.argv = ["compile-steer", *arguments]
    code: Any = 1
    try:
        temporary = Path("tmp").resolve()
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        if "run" in arguments[:1]:
            spare = _Spare(prepare)
            # A stand-in for the module, in this fork alone.
            vars(stages)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "run": spare.run})
        prepare()
        entry.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:  # as an interpreter prints it
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120  # as an interpreter that cannot flush
    os._exit(code if isinstance(code, int) else int(code is not None))


class _Spare:
    """In the place of the process that verifies: a fork made before the command has begun, which knows nothing of it."""

    def __init__(self, prepare: Callable[[], object]) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        reader, self.writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(self.writer)
            with os.fdopen(reader) as pipe:
                message = pipe.read()
            if not message:
                os._exit(0)
            arguments, environment = json.loads(message)
            os.environ.update(environment)

            def redirect() -> None:
                prepare()
                os.dup2(self.output.fileno(), 1)

            _behave_as_command(arguments, redirect)
        os.close(reader)

    def run(self, command: Sequence[str], env: Mapping[str, str], **_options: object) -> SimpleNamespace:
        """In the place of `subprocess.run` for `python -m compile_steer ...` with standard output captured."""
        arguments = command[command.index("compile_steer") + 1 :]
        with os.fdopen(self.writer, "w") as pipe:
            pipe.write(json.dumps([arguments, dict(env)]))
        status = os.waitpid(self.process, 0)[1]
        self.output.seek(0)
        return SimpleNamespace(returncode=os.waitstatus_to_exitcode(status), stdout=self.output.read())


def _kill_group(process: int) -> None:
    with suppress(ProcessLookupError):  # it has ended
        os.killpg(process, signal.SIGKILL)


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _seconds(process: int) -> float:
    """Of the processor, in a process that runs."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def repeatable() -> None:
    """Hold the clock that reports take seconds from, so that two runs leave the same bytes; draw nothing, which is half the work."""
    time.perf_counter = lambda: 0.0
    vars(page)["_svg"] = lambda *_arguments: "<svg/>"
