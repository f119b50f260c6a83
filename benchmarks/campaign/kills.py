"""A small run killed with SIGKILL, then run again: it must end as one that nobody disturbed, in the same bytes.

What a kill leaves is the output folder as it is at that moment. One run is watched, and its folder is copied before
every act on a file; a run starts from every copy that differs from those before it. Every twentieth kill, and those at
random moments, are real: they show that the copies are what a kill leaves. Acts are counted by Python's audit events,
across the process that verifies; what libraries write without Python (the bytes of tensors) is met by random moments.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign import trial
from benchmarks.campaign.case import RUN, Case

# Audit events, and which of their arguments is a path. Of `open` only those that write are counted.
_EVENTS = {
    "open": 0, "os.rename": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.link": 1, "os.symlink": 1, "os.truncate": 0,
    "os.chmod": 0, "shutil.rmtree": 0, "shutil.copyfile": 1, "shutil.move": 1,
}  # fmt: skip
_RANDOM = re.compile(r"\.writing-\d+-[^/]*")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kill_group() -> None:
    """Kill this process and its forks."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


class WritePoints:
    """Counts acts on files below the output folder; `before` is called with the number of each, from 1 on."""

    def __init__(self, out: Path, before: Callable[[int], object] = lambda _number: None) -> None:
        self._out, self._before, self._busy = str(out), before, False
        self._shared = mmap.mmap(-1, 8)  # forks go on with the count

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    def install(self) -> None:
        """Watch this process from now on; call it in a fork, because a watch cannot be taken away."""
        sys.addaudithook(self._hear)
        for name in ("fsync", "fdatasync"):  # without audit events
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self._act()
            return function(*arguments)

        return counted

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy:
            return
        if event == "ctypes.dlsym" and "renameat2" in arguments:
            self._act()
        elif event in _EVENTS:
            path = arguments[_EVENTS[event]]
            if event == "open" and not int(arguments[2] or 0) & _WRITES:
                return
            # A bare name is of a file in a folder that is being removed.
            if isinstance(path, str | bytes | os.PathLike):
                place = os.fsdecode(path)
                if self._out in str(Path(place).absolute()) or (
                    event in ("os.remove", "os.rmdir") and "/" not in place
                ):
                    self._act()

    def _act(self) -> None:
        self._busy = True
        self._shared[:8] = (self.count + 1).to_bytes(8, "little")
        self._before(self.count)
        self._busy = False


def at(point: int, act: Callable[[], object] = kill_group) -> Callable[[int], object]:
    """What to do before each write point: at one, `act`."""
    return lambda number: act() if number == point else None


@dataclass(frozen=True)
class Sound:
    """The undisturbed run: its exit code, the last line of its errors, files, write points, and seconds."""

    code: int
    last_line: str
    files: dict[str, str]
    points: int
    seconds: float


def undisturbed(case: Case, states: Path | None = None) -> Sound:
    """Run the recipe from nothing; with `states`, every state of its output folder is copied there."""
    out = case.root / "out"

    def keep(_number: int) -> None:
        if states is not None:
            target = states / _state(out)
            if not target.exists():
                shutil.copytree(out, target, symlinks=True)

    out.mkdir()
    watch = WritePoints(out, keep)
    started = time.monotonic()
    outcome = run(case, watch.install)
    return Sound(outcome.code, outcome.last_line, files(case), watch.count, time.monotonic() - started)


def killed(case: Case, sound: Sound, kill: Callable[[], trial.Outcome]) -> str:
    """Kill a run and run again; returns what went wrong, or nothing."""
    first = kill()
    if first.code not in (-signal.SIGKILL, sound.code):
        return f"it ended with {first.code} ({first.last_line})"
    return _ended_as(case, sound, "run again, ")


def _ended_as(case: Case, sound: Sound, when: str) -> str:
    again = run(case)
    if again.code != sound.code:
        return f"{when}it ended with {again.code} ({again.last_line})"
    other = differing(case, sound)
    return f"{when}it left others: {', '.join(other[:4])}" if other else ""


def _state(out: Path) -> str:
    """A hash of all that lies below; names of temporaries count without their process and random part."""
    parts = []
    for path in sorted(out.rglob("*")):
        name = _RANDOM.sub(".writing", str(path.relative_to(out)))
        parts.append(name + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""))
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16]


def differing(case: Case, sound: Sound) -> list[str]:
    """The files that are not those of the undisturbed run."""
    found = files(case)
    return sorted(name for name in {*found, *sound.files} if found.get(name) != sound.files.get(name))


def from_state(case: Case, sound: Sound, state: Path) -> str:
    """Run from what a kill would have left."""
    clear(case)
    shutil.copytree(state, case.root / "out", symlinks=True)
    return _ended_as(case, sound, "")


def at_point(case: Case, sound: Sound, point: int) -> str:
    """Kill before this write point."""
    clear(case)
    return killed(case, sound, lambda: run(case, WritePoints(case.root / "out", at(point)).install))


def at_moment(case: Case, sound: Sound, moment: float) -> str:
    """Kill after so many seconds."""
    clear(case)
    return killed(case, sound, lambda: run(case, kill_after=moment))


def run(
    case: Case,
    watch: Callable[[], object] = lambda: None,
    kill_after: float | None = None,
    command: Sequence[str] = RUN,
) -> trial.Outcome:
    """Run the recipe with its clock held, so that the same bytes come out; `watch` is called in the fork first."""

    def prepare() -> None:
        trial.repeatable()
        watch()

    return trial.run(command, case.root, prepare, limit=300, kill_after=kill_after)


def files(case: Case) -> dict[str, str]:
    """The hashes of what a run left, by name; the intermediate state does not count."""
    found = Case(case.root / "out").snapshot(without=())
    return {
        name: content for name, content in found.items() if not name.startswith("work/") and not name.endswith(".lock")
    }


def clear(case: Case) -> None:
    """Take away what commands left."""
    for name in ("out", "tmp"):
        shutil.rmtree(case.root / name, ignore_errors=True)
