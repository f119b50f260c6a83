"""Inputs that are wrong: each must be refused in words that name its place, quickly, with nothing left or changed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.campaign import bad_artifacts, bad_data, bad_models, bad_options, bad_recipes, bad_vectors, trial
from benchmarks.campaign.case import Bad, Case

SECONDS, BYTES = 10.0, 2 * trial.GIB
MODULES = (bad_recipes, bad_options, bad_data, bad_models, bad_vectors, bad_artifacts)


@dataclass(frozen=True)
class Result:
    """What was wrong with the answer to one bad input; nothing, if it was refused as it must be."""

    name: str
    problems: tuple[str, ...]
    silent: bool
    outcome: trial.Outcome

    @property
    def seconds(self) -> float:
        return self.outcome.seconds


def all_inputs() -> list[Bad]:
    """Every bad input; their names are distinct."""
    found = [bad for module in MODULES for bad in module.inputs()]
    names = [bad.name for bad in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    assert not repeated, f"names given twice: {repeated}"
    return found


def sample(inputs: Sequence[Bad], count: int) -> list[Bad]:
    """Always the same `count` of them."""
    return random.Random(16).sample(inputs, count)


def attempt(base: Case, bad: Bad, run: Callable[..., trial.Outcome], start: float) -> Result:
    """Try one bad input on a copy of `base`; `start` is what an interpreter's start takes where `run` is a fork."""
    with tempfile.TemporaryDirectory() as parent:
        case = base.copy(Path(parent).resolve() / "case", bad.finished)
        (case.root / "tmp").mkdir()
        bad.edit(case)
        before = case.snapshot()
        outcome = run(bad.command, case.root)
        after = case.snapshot()
        problems = list(_problems(bad, outcome, start))
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        problems += [f"changed {', '.join(changed[:4])}"] * bool(changed)
        left = [path for name in ("out", "tmp") for path in (case.root / name).rglob("*") if not path.is_dir()]
        if left and outcome.code != 3 and not (bad.late or outcome.ended):
            problems.append(f"left {', '.join(str(path.relative_to(case.root)) for path in left[:4])}")
    silent = outcome.code in (0, 1) and "Traceback" not in outcome.errors
    return Result(bad.name, tuple(problems), silent, outcome)


def _problems(bad: Bad, outcome: trial.Outcome, start: float) -> Iterator[str]:
    if outcome.ended:
        yield outcome.ended
    if outcome.code != 2:
        yield f"exit code {outcome.code}"
    if "Traceback (most recent call last)" in outcome.errors + outcome.output:
        yield "traceback"
    folded = " ".join(outcome.errors.replace("│", " ").split())
    missing = [word for word in bad.words if not any(one in folded for one in word.split("|"))]
    if missing and outcome.code == 2:
        yield f"the message lacks {', '.join(missing)}"
    if outcome.seconds + start > SECONDS:
        yield f"{outcome.seconds + start:.0f} s"
    if outcome.peak > BYTES:
        yield f"{outcome.peak / trial.GIB:.1f} GiB"


def attempts(base: Case, inputs: Sequence[Bad], start: float) -> Iterator[Result]:
    """Try each in a fork."""
    for bad in inputs:
        yield attempt(base, bad, trial.run, start)
