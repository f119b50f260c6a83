"""Interference: co-loaded and composed adapters compared with the hooks of all programs at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compile_steer.artifacts.files import digest
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.cli.app import app
from compile_steer.common.errors import CompileSteerError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.text import Text
from compile_steer.steering.passes import canonical
from compile_steer.tools.compose import co_load, compose
from compile_steer.tools.interference import (
    CO_LOADED,
    JOINT,
    STACKED,
    Composition,
    Member,
    measure_interference,
    sum_programs,
    unseen_texts,
)
from tests.helpers.composition import NAMES, CompositionCase, co_loaded
from tests.helpers.fitting import solve, stages_of
from tests.helpers.tiny import intervention

Save = Callable[[str], LoadedModel]


def test_co_loaded_adapters_are_measured_as_a_user_of_peft_would_run_them(
    case: CompositionCase, two: tuple[Path, Path]
) -> None:
    loose = ["--set", "verify.gates.kl_remaining=0.2"]  # what two rank-4 edits on a random tiny model can be asked
    scales = ["--scale", "1", "--scale", "0.5", "--device", "cpu"]
    command = ["co-load", *map(str, two), "--runs", str(case.runs), *scales]
    result = CliRunner().invoke(app, [*command, *loose, "--json"])
    assert result.exit_code == 0, result.output
    composition = json.loads(result.stdout)
    paths = RunPaths(case.runs / "+".join(NAMES), "+".join(NAMES))
    record = json.loads(paths.composed("closed_form-loaded.json").read_text(encoding="utf-8"))
    assert record.pop("record_sha256") and record == composition
    assert list(composition["artifacts"]) == list(composition["states"]["errors"]) == [CO_LOADED]
    assert (
        composition["artifacts"][CO_LOADED] == composition["settings"][0] and composition["stacked_from_loaded"] is None
    )
    assert set(composition["matrix"][0]["errors"]) == {CO_LOADED}
    # What a user of PEFT does by hand, against both hooks at once, on the very texts.
    run = case.open(*two, scales=(1, 0.5))
    both = sum_programs(run.members, [1, 0.5])
    model = co_loaded(case.base, [one.adapter for one in run.members], (1, 0.5))
    heldout = unseen_texts(case.base, run.members, Progress())
    assert digest([list(one.ids) for one in heldout]) == composition["sha256"]["texts"]
    hooks = final_states(case.base, heldout, both).response
    adapters = final_states(replace(case.base, model=model), heldout).response
    by_hand = divergence(case.base.model, hooks, case.base.model, adapters).mean
    assert composition["artifacts"][CO_LOADED]["kl"] == pytest.approx(by_hand, rel=1e-4) and by_hand > 0
    # One of the two emptied: alone it is nothing, and together they are not both programs.
    adapter = run.members[1].adapter
    write_patch(adapter, 0.0 * read_patch(adapter), case.base, Provenance.read(adapter), "")
    failed = CliRunner().invoke(app, [*command, *loose])
    assert failed.exit_code == 1 and "FAILED co-loaded: KL" in failed.output


def composed(case: CompositionCase, two: tuple[Path, Path], *dials: float) -> Composition:
    return compose(case.open(*two, scales=dials))


def test_interference_of_the_programs_falls_with_the_square_of_the_scale(
    case: CompositionCase, two: tuple[Path, Path]
) -> None:
    strong, weak = composed(case, two, 2, 2), composed(case, two, 0.02, 0.02)
    assert strong.states.programs > 0.05
    assert weak.states.programs < 0.05 * strong.states.programs
    for row in weak.matrix:  # far below the effects themselves
        size = max(abs(interval.value) for interval in row.effects.values())
        assert abs(row.cross["hooks"].value) < 0.05 * size


def test_a_program_and_its_negation_cancel_and_have_no_remaining_kl(case: CompositionCase) -> None:
    steering = case.program(intervention(layer=1, coefficient=0.4))
    composition = composed(case, (case.compiled("one", steering), case.compiled("two", steering)), 1, -1)
    assert composition.settings[0].kl_remaining is None
    assert all(fit.kl_remaining is not None for fit in composition.settings[1:])
    for row in composition.matrix:
        assert abs(row.effects["hooks all"].value) < 1e-6
        assert abs(row.effects[STACKED].value) < 1e-5, "the sum of an adapter and its negation is nothing"
    assert composition.states.errors[STACKED] < 1e-5
    # Each alone is off by its own error, and those do not cancel; together they do: all of it is the cross term.
    assert composition.states.cross == pytest.approx(composition.states.alone, rel=1e-3)


@pytest.mark.parametrize("planted", ["one left out", "a scale ignored", "emptied"])
def test_an_adapter_that_is_not_the_sum_fails(case: CompositionCase, two: tuple[Path, Path], planted: str) -> None:
    run = case.open(*two, scales=(1, 2))
    compose(run)
    folder = run.paths.composed("closed_form-stacked")
    own = [read_patch(one.adapter) for one in run.members]
    wrong = {"one left out": own[0], "a scale ignored": own[0] + own[1], "emptied": 0.0 * (own[0] + own[1])}[planted]
    write_patch(folder, wrong, case.base, Provenance.read(folder), "")
    folders = {way: run.paths.composed(f"closed_form-{way}") for way in (STACKED, JOINT)}
    composition = measure_interference(case.base, run.members, "closed_form", folders, Progress())
    assert not composition.passed
    assert any(reason.startswith("stacked: KL") for reason in composition.reasons)
    assert composition.stacked_from_loaded is not None and composition.stacked_from_loaded > 1e-4


def test_an_adapter_that_does_not_follow_its_scale_is_named(case: CompositionCase) -> None:
    recipes = []
    for number, name in enumerate(NAMES):
        steering = case.program(intervention(layer=1 + number))
        neuron = solve(case.base, canonical(steering), stages_of(case.base, canonical(steering)))
        recipes.append(case.run(name, steering, neuron, start=10_000 * number))
    for scales, named in (((1, 2), {"still"}), ((0.5, 2), {"high.tide", "still"}), ((1, 1), set())):
        composition = co_load(case.open(*recipes, scales=scales))
        about = {name for name in NAMES for reason in composition.reasons if f"{name}: its adapter alone" in reason}
        assert about == named, composition.reasons


def test_prompts_that_another_compile_has_seen_are_left_out(case: CompositionCase, two: tuple[Path, Path]) -> None:
    run = case.open(*two)
    first, second = run.members
    data = second.data
    seen = replace(first.data, heldout=data.calibration[:9])
    folders = {way: first.adapter for way in (STACKED, JOINT)}
    composition = measure_interference(
        case.base, [replace(first, data=seen), second], "closed_form", folders, Progress()
    )
    only = measure_interference(
        case.base, [replace(first, data=replace(seen, heldout=())), second], "", folders, Progress()
    )
    assert composition.sha256["texts"] == only.sha256["texts"]
    nothing: list[Member] = [replace(one, data=replace(one.data, heldout=data.calibration)) for one in run.members]
    with pytest.raises(CompileSteerError, match=r"data\.heldout: every prompt is among"):
        measure_interference(case.base, nothing, "", folders, Progress())
    prompts = tuple(Text(pair.prompt) for pair in first.data.test)
    other = replace(second, data=replace(data, calibration=prompts))
    with pytest.raises(CompileSteerError, match=r"data\.test: every prompt of high\.tide is among"):
        measure_interference(case.base, [first, other], "", folders, Progress())
