"""The estimate of a run grows with what is measured."""

from __future__ import annotations

import pytest

from compile_steer.pipeline.estimate import estimate
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from tests.helpers.small_run import SmallRun


def test_more_texts_and_more_backends_take_longer(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compile_steer.pipeline.estimate._seconds_per_token", lambda _run: 1e-3)
    opened = run.open()

    def minutes(*changes: str) -> float:
        return estimate(Run(read_recipe(run.recipe, changes), run.paths, opened.context))

    least = minutes("compile.backends=[bias]")
    for change in ("validate.layers=[0,1]", "validate.max_new_tokens=40", "verify.heldout=80", "verify.long=9",
                   "compile.backends=[bias, closed_form]", "compile.backends=[distill]"):  # fmt: skip
        assert minutes("compile.backends=[bias]", change) > least


def test_the_speed_is_measured(run: SmallRun) -> None:
    assert 0.5 <= estimate(run.open()) < 5  # a tiny model: the start of its processes
