"""The estimate of a run grows with what is measured, and knows the memory of the weights."""

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
        return estimate(Run(read_recipe(run.recipe, changes), run.paths, opened.context))[0]

    least = minutes("compile.backends=[bias]")
    for change in ("validate.layers=[0,1]", "validate.max_new_tokens=40", "verify.heldout=80", "verify.long=9",
                   "compile.backends=[bias, closed_form]", "compile.backends=[distill]"):  # fmt: skip
        assert minutes("compile.backends=[bias]", change) > least


def test_the_speed_is_measured_and_the_memory_is_of_the_weights(run: SmallRun) -> None:
    minutes, memory = estimate(run.open())
    assert 0.5 <= minutes < 5 and 1.2 < memory < 1.3  # a tiny model: libraries and their start
