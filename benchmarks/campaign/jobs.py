"""The parts of the campaign as jobs that two processes share, and what comes of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.campaign import attacks, bad_input, disk, kills, soak, together, trial
from benchmarks.campaign.case import EXTRACT, Case, prepare
from benchmarks.tampering import TAMPERINGS, unnoticed
from tests.helpers import small_run

REAL_KILLS = 20  # one in so many write points is killed in earnest
MOMENTS = 100
SOAK_RUNS = 200


@dataclass(frozen=True)
class Finding:
    """One thing that was tried, and what was wrong; `row` is the line of the page that it counts in."""

    row: str
    name: str
    problem: str = ""
    silent: bool = False  # a wrong input that ended as a right one
    seconds: float = 0.0
    peak: int = 0


@dataclass(frozen=True)
class Setting:
    """What every job needs: the case with its finished run, the undisturbed run and its states, seconds of a start."""

    base: Case
    sound: kills.Sound
    states: Path
    start: float


Job = Callable[[Setting], list[Finding]]


@contextmanager
def fresh_case(base: Case) -> Iterator[Case]:
    """A copy of what a run reads, with one model for all: its adapters name the full path of their base."""
    with tempfile.TemporaryDirectory() as parent:
        case = base.copy(Path(parent).resolve() / "case", finished=False)
        shutil.rmtree(case.model)
        case.model.symlink_to(base.model)
        yield case


def inputs(part: slice, count: int | None, setting: Setting) -> list[Finding]:
    """Bad inputs in forks."""
    chosen = bad_input.all_inputs() if count is None else bad_input.sample(bad_input.all_inputs(), count)
    return [
        Finding("inputs", result.name, "; ".join(result.problems), result.silent, result.seconds, result.outcome.peak)
        for result in bad_input.attempts(setting.base, chosen[part], setting.start)
    ]


def processes(count: int, setting: Setting) -> list[Finding]:
    """Bad inputs in interpreters of their own: the same exit code and message as in forks."""
    found = []
    for bad in bad_input.sample(bad_input.all_inputs(), count):
        answers = [
            bad_input.attempt(setting.base, bad, run, start).outcome
            for run, start in ((trial.run, setting.start), (trial.run_process, 0.0))
        ]
        same = answers[0].code == answers[1].code and len(answers[0].last_line) == len(answers[1].last_line)
        wrong = (
            "" if same else f"{answers[0].code} ({answers[0].last_line}), {answers[1].code} ({answers[1].last_line})"
        )
        found.append(Finding("processes", bad.name, wrong))
    return found


def states(part: slice, setting: Setting) -> list[Finding]:
    """Runs from every state that a kill can leave."""
    with fresh_case(setting.base) as case:
        return [
            Finding("kills", f"state {state.name}", kills.from_state(case, setting.sound, state))
            for state in sorted(setting.states.iterdir())[part]
        ]


def points(numbers: Sequence[int], setting: Setting) -> list[Finding]:
    """Kills at write points."""
    with fresh_case(setting.base) as case:
        return [Finding("kills", f"write point {n}", kills.at_point(case, setting.sound, n)) for n in numbers]


def moments(count: int, seed: int, setting: Setting) -> list[Finding]:
    """Kills at random moments."""
    draw = random.Random(seed)
    times = [draw.uniform(0, setting.sound.seconds) for _ in range(count)]
    with fresh_case(setting.base) as case:
        return [Finding("kills", f"after {t:.2f} s", kills.at_moment(case, setting.sound, t)) for t in times]


def troubles(part: slice, setting: Setting) -> list[Finding]:
    """Places that cannot be written to."""
    sound, no_disk = setting.sound, disk.disks()
    with fresh_case(setting.base) as case:
        tries: list[tuple[str, Callable[[], str]]] = [
            (trouble.name, partial(disk.tried, case, sound, trouble)) for trouble in disk.troubles(sound.points)
        ]
        if not no_disk:
            sizes = [(f"a disk of {size}", partial(disk.on_full_disk, case, sound, size)) for size in disk.SIZES]
            tries += [*sizes, ("a read-only disk", partial(disk.on_read_only_disk, case, sound))]
        found = [Finding("disk", name, attempt()) for name, attempt in tries[part]]
    return found + [Finding("skipped", no_disk)] * bool(no_disk)


def attacked(part: slice, setting: Setting) -> list[Finding]:
    """Artifacts of strangers who mean harm."""
    with attacks.Host().listening() as host:
        return [
            Finding("attacks", f"{one.kind}: {one.name}", "; ".join(attacks.succeeded(setting.base, one, host)))
            for one in list(attacks.attacks(host.port))[part]
        ]


def modules(_setting: Setting) -> list[Finding]:
    """Modules of the current folder."""
    with tempfile.TemporaryDirectory() as folder:
        ran = attacks.modules_of_the_folder(Path(folder))
    return [Finding("attacks", "code run from the current folder: modules of libraries' names", ", ".join(ran))]


def beside(setting: Setting) -> list[Finding]:
    """Two commands in one folder."""
    with fresh_case(setting.base) as case:
        return [Finding("together", name, wrong) for name, wrong in together.tried(case, setting.sound)]


def soaked(runs: int, setting: Setting) -> list[Finding]:
    """Many runs in one process."""
    with fresh_case(setting.base) as case:
        measured = soak.measured(case, runs)
    grown = soak.growth(measured)
    return [Finding("soak", name, grown.get(name, "")) for name in measured[0]]


def tampered(part: slice, _setting: Setting) -> list[Finding]:
    """Artifacts that were changed after they were made."""
    found = []
    with tempfile.TemporaryDirectory() as parent:
        whole = small_run.complete_run(Path(parent) / "whole").root
        for one in TAMPERINGS[part]:
            root = shutil.copytree(whole, Path(parent) / "copy")
            found.append(Finding("tampering", str(one), unnoticed(one, root)))
            shutil.rmtree(root)
    return found


def full(sound: kills.Sound) -> list[Job]:
    """All of it, the longest first."""
    real = range(1, sound.points + 1, REAL_KILLS)
    return [
        partial(soaked, SOAK_RUNS),
        *(partial(states, slice(n, None, 10)) for n in range(10)),
        *(partial(moments, MOMENTS // 10, n) for n in range(10)),
        *(partial(points, real[n::4]) for n in range(4)),
        *(partial(inputs, slice(n, None, 20), None) for n in range(20)),
        *(partial(troubles, slice(n, None, 4)) for n in range(4)),
        *(partial(attacked, slice(n, None, 4)) for n in range(4)),
        *(partial(tampered, slice(n, None, 4)) for n in range(4)),
        partial(processes, 12),
        modules,
        beside,
    ]


def short(sound: kills.Sound) -> list[Job]:
    """Always the same sample of it, without what depends on the moment."""
    return [
        partial(soaked, 4),
        beside,
        partial(states, slice(3, None, 50)),
        partial(points, [sound.points * n // 4 for n in (1, 2, 3)]),
        partial(troubles, slice(2, None, 7)),
        partial(tampered, slice(0, None, 8)),
        partial(attacked, slice(1, None, 6)),
        partial(processes, 1),
        partial(inputs, slice(0, None, 2), 30),
        partial(inputs, slice(1, None, 2), 30),
    ]


def guarded(job: Job, setting: Setting) -> list[Finding]:
    """A job's findings; the campaign's own failure is a finding too, and ends nothing else."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return job(setting)
    except Exception as error:
        name = getattr(job, "func", job).__name__
        return [Finding("campaign", f"{name} itself ({os.getpid()})", f"{type(error).__name__}: {error}")]


def prepared(root: Path, timed: bool = True) -> Setting:
    """Make the case, watch the undisturbed run, and keep it as the finished one; `timed`: measure a start too."""
    base = prepare(root / "base")
    with fresh_case(base) as case:
        folder = root / "states"
        sound = kills.undisturbed(case, folder)
        assert sound.code in (0, 1), f"the undisturbed run ended with {sound.code} ({sound.last_line})"
        shutil.copytree(case.root / "out", base.finished, symlinks=True)
        start = 0.0
        if timed:
            kills.clear(case)
            start = trial.run_process(EXTRACT, case.root).seconds
            kills.clear(case)
            start -= trial.run(EXTRACT, case.root).seconds
    return Setting(base, sound, folder, start)
