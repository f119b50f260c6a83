"""Places that cannot be written to: a full disk, quotas, read-only folders, folders that vanish, files in the way.

Each must end with exit code 2 and words about the place; with the cause gone, the same command must end in the bytes of
an undisturbed run.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.campaign import kills
from benchmarks.campaign.case import RUN, Case

NOBODY = 65534


@dataclass(frozen=True)
class Trouble:
    """A trouble: what is done to the folders before, what in the fork, and what ends it.

    Attributes:
        words: one of them must be said.
        may_finish: whether the run may also end as if nothing had been, because the trouble came when all was written.
    """

    name: str
    words: tuple[str, ...]
    before: Callable[[Case], object] = lambda _case: None
    within: Callable[[Case], object] = lambda _case: None
    after: Callable[[Case], object] = lambda _case: None
    command: tuple[str, ...] = RUN
    may_finish: bool = False


def tried(case: Case, sound: kills.Sound, trouble: Trouble) -> str:
    """Meet a trouble, then run again without it; returns what went wrong."""
    kills.clear(case)
    (case.root / "tmp").mkdir()
    trouble.before(case)
    try:
        outcome = kills.run(case, lambda: trouble.within(case), command=trouble.command)
    finally:
        trouble.after(case)
    problems = []
    if outcome.code != 2 and not (trouble.may_finish and outcome.code == sound.code):
        problems.append(f"exit code {outcome.code} ({outcome.last_line})")
    if "Traceback" in outcome.errors:
        problems.append("traceback")
    if outcome.code == 2 and not any(word in outcome.errors for word in trouble.words):
        problems.append(f"does not say {' or '.join(trouble.words)} ({outcome.last_line})")
    again = kills.run(case)
    other = kills.differing(case, sound)
    if again.code != sound.code or other:
        problems.append(f"run again, it ended with {again.code} ({again.last_line}) and other {', '.join(other[:3])}")
    return "; ".join(problems)


def _limit(kind: int, value: int, _case: Case) -> None:
    resource.setrlimit(kind, (value, value))


def _as_nobody(_case: Case) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def _read_only(case: Case) -> None:
    (case.root / "out").mkdir()
    (case.root / "out").chmod(0o555)
    for path in (case.root, case.root / "tmp"):
        path.chmod(0o777)


def _writable(case: Case) -> None:
    (case.root / "out").chmod(0o755)


def _in_the_way(name: str, case: Case) -> None:
    path = case.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")


def _folder_in_the_way(name: str, case: Case) -> None:
    (case.root / name / "kept").mkdir(parents=True)


def _gone(name: str, case: Case) -> None:
    path = case.root / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(target: str, case: Case) -> None:
    (case.root / "out").symlink_to(target)


def _vanishing(point: int, case: Case) -> None:
    out = case.root / "out"
    kills.WritePoints(out, kills.at(point, lambda: shutil.rmtree(out, ignore_errors=True))).install()


def _full_output(_case: Case) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def troubles(points: int) -> Iterator[Trouble]:
    """Those without a disk of their own; `points` is the number of write points of a run."""
    for size in (1000, 8000, 100_000, 178_000):
        limit = partial(_limit, resource.RLIMIT_FSIZE, size)
        yield Trouble(f"files of at most {size:,} bytes", ("too large", "File too large"), within=limit)
    few = partial(_limit, resource.RLIMIT_NOFILE, 24)
    yield Trouble("24 open files at most", ("Too many open files",), within=few, may_finish=True)
    for name in ("out", "out/vectors", "out/adapters", "out/merged", "out/work"):
        place, gone = partial(_in_the_way, name), partial(_gone, name)
        yield Trouble(f"a file at {name}", (name,), place, after=gone, may_finish=name == "out/work")
    for name in ("tide.html", *(f"vectors/tide.{end}" for end in ("safetensors", "validation.json", "prompts.jsonl"))):
        place, gone = partial(_folder_in_the_way, f"out/{name}"), partial(_gone, f"out/{name}")
        yield Trouble(f"a folder at out/{name}", (name,), place, after=gone)
    for target in ("gone", "out"):
        link, gone = partial(_link, target), partial(_gone, "out")
        name = f"an output folder that is a link to {target}"
        yield Trouble(name, ("out",), link, after=gone, may_finish=target == "gone")
    long = (*RUN[:3], "x" * 300, "--force")
    yield Trouble("an output folder of 300 letters", ("too long",), command=long)
    yield Trouble("standard output on a full disk", ("space", "written"), within=_full_output)
    if os.getuid() == 0:
        yield Trouble("a read-only folder, as nobody", ("Permission denied",), _read_only, _as_nobody, _writable)
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
        vanish = partial(_vanishing, int(share * points))
        name = f"the output folder deleted at {share:.0%} of its write points"
        yield Trouble(name, ("out",), within=vanish, after=partial(_gone, "out"), may_finish=True)


@contextmanager
def _disk(options: str) -> Iterator[Path]:
    """A disk in memory, mounted for as long as the block runs."""
    with tempfile.TemporaryDirectory() as parent:
        place = Path(parent)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", parent], check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", parent], check=True)


def disks() -> str:
    """Why no disk can be mounted here; nothing if one can."""
    try:
        with _disk("size=64k"):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a disk cannot be mounted here ({error})"


def on_full_disk(case: Case, sound: kills.Sound, options: str) -> str:
    """Run onto a disk that is too small, make it larger, run again; returns what went wrong."""
    kills.clear(case)
    with _disk(options) as disk:
        place = disk / "out"
        place.mkdir()
        (case.root / "out").symlink_to(place)
        outcome = kills.run(case)
        problems = []
        if outcome.code != 2 or "No space left" not in outcome.errors or "Traceback" in outcome.errors:
            problems.append(f"exit code {outcome.code} ({outcome.last_line})")
        left = [path.name for path in place.rglob(".*")]
        if left:
            problems.append(f"left {', '.join(left[:3])}")
        subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=9999", str(disk)], check=True)
        again, other = kills.run(case), kills.differing(case, sound)
        if again.code != sound.code or other:
            problems.append(
                f"run again, it ended with {again.code} ({again.last_line}) and other {', '.join(other[:3])}"
            )
        (case.root / "out").unlink()
    return "; ".join(problems)


SIZES = (
    "size=4k",
    "size=24k",
    "size=48k",
    "size=128k",
    "size=300k",
    "size=600k",
    "size=64m,nr_inodes=6",
    "size=64m,nr_inodes=24",
)


def on_read_only_disk(case: Case, sound: kills.Sound) -> str:
    """Run onto a disk that is mounted read-only."""
    with _disk("size=8m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        command = (*RUN[:3], str(disk / "out"), "--force")
        return tried(case, sound, Trouble("", ("Read-only",), command=command))
