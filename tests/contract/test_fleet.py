"""Several recipes over two workers: one table, a base loaded once a worker, and a killed worker's task done by another."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from compile_steer.__main__ import main
from compile_steer.artifacts.contents import file_hashes
from compile_steer.common.errors import RecipeError
from compile_steer.models.load import LoadedModel
from compile_steer.pipeline import run as pipeline_run
from compile_steer.recipe import Recipe
from compile_steer.tools import fleet
from compile_steer.tools.fleet import Row, Task, run_fleet
from tests.helpers.small_run import prepare


def recipes(root: Path, *names: str) -> list[Path]:
    """Recipes that differ in their names, of one model."""
    first = prepare(root).recipe
    content = YAML(typ="safe").load(first)
    paths = [first.with_name(f"{name}.yaml") for name in names]
    for name, path in zip(names, paths, strict=True):
        with path.open("w", encoding="utf-8") as file:
            YAML().dump({**content, "name": name}, file)
    return paths


def kill_the_worker_of(out: Path, name: str) -> threading.Thread:
    """Kill the process that works on a recipe as soon as its directions are there, which its successor is to keep."""

    def wait_and_kill() -> None:
        lock, directions = out / name / ".compile_steer.lock", out / name / "vectors" / f"{name}.directions.safetensors"
        for _ in range(6000):
            if directions.exists() and lock.exists():
                os.kill(json.loads(lock.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_killed_workers_recipe_is_finished_by_another(engine: str, tmp_path: Path) -> None:
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    paths, out, lines = recipes(tmp_path, "ebb", "flow"), tmp_path / "runs", list[str]()
    killer, there = kill_the_worker_of(out, "flow"), tmp_path / "there"
    done = run_fleet(paths, out, engine=engine, workers=2, store=f"file://{there}", report=lines.append)
    killer.join()
    assert [(row.name, row.state, row.verdict, row.lost_workers) for row in done.rows] == [
        ("ebb", "failed", "fail", 0),
        ("flow", "failed", "fail", 1),
    ]
    assert "flow: validate: its worker ended; given to another" in lines
    validations = [
        json.loads((out / row.name / "vectors" / f"{row.name}.validation.json").read_text()) for row in done.rows
    ]
    assert validations[0]["margin"] == validations[1]["margin"]
    for folder in (out, there):
        table = json.loads((folder / "fleet.json").read_text(encoding="utf-8"))
        assert [Row(**row) for row in table["rows"]] == done.rows
    for name in ("ebb", "flow"):
        assert json.loads((there / name / "files.json").read_text()) == file_hashes(out / name)


class InThisProcess:
    """An engine of one worker that does each task at once; `before` is called with the number of tasks done so far."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.before, self.outcomes = before, list[dict[str, Any]]()

    def submit(self, worker: int, task: Task) -> None:
        self.before(len(self.outcomes))
        self.outcomes.append(fleet.perform(task))

    def next(self) -> tuple[int, dict[str, Any]]:
        return 0, self.outcomes[-1]

    def close(self) -> None: ...


def test_storage_lost_midway_fails_the_recipes_that_are_left_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, there, away = recipes(tmp_path, "ebb", "flow"), tmp_path / "there", tmp_path / "away"
    url = f"file://{there}"

    def fleet_on(machine: str, lost: bool = False) -> fleet.Fleet:
        def before(done: int) -> None:
            if lost and done == 1:
                there.rename(away)

        monkeypatch.setitem(fleet._ENGINES, "inline", lambda _workers: InThisProcess(before))
        return run_fleet(paths, tmp_path / machine, engine="inline", workers=1, store=url)

    rows = fleet_on("one", lost=True).rows
    assert [row.state for row in rows] == ["failed", "error"]
    assert f"{url} was lost" in rows[1].problems[0] and not there.exists()
    away.rename(there)
    assert [row.state for row in fleet_on("one").rows] == ["failed", "failed"]
    made = {name: file_hashes(tmp_path / "one" / name) for name in ("ebb", "flow")}
    monkeypatch.delattr(pipeline_run, "validate")  # what the storage has is kept, not made again
    assert [row.state for row in fleet_on("other").rows] == ["failed", "failed"]
    assert {name: file_hashes(tmp_path / "other" / name) for name in made} == made


def report_pid(pipe: Connection, _number: int, _threads: int) -> None:
    while True:
        pipe.recv()
        pipe.send({"pid": os.getpid()})


def test_an_idle_worker_that_was_killed_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_serve", report_pid)
    engine, task = fleet.LocalEngine(2), Task(Path("x"), (), Path("y"), "compile", False)
    monkeypatch.setattr(engine, "_context", multiprocessing.get_context("fork"))  # in an instant, without imports
    with closing(engine):
        engine.submit(0, task)
        worker, killed = engine.next()
        assert worker == 0 and killed is not None
        os.kill(killed["pid"], signal.SIGKILL)
        engine._processes[0].join()
        engine.submit(1, task)
        assert engine.next()[0] == 1  # of the idle one there is nothing to say
        engine.submit(0, task)
        worker, outcome = engine.next()
        assert worker == 0 and outcome is not None and outcome["pid"] != killed["pid"]


def test_a_worker_loads_a_base_once_and_goes_through_all_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(fleet, "_warm", {})
    load_base = pipeline_run.load_base

    def counted(recipe: Recipe) -> LoadedModel:
        loads.append(recipe.name)
        return load_base(recipe)

    monkeypatch.setattr(pipeline_run, "load_base", counted)
    changes = ("compile.backends=[bias]",)
    for path in recipes(tmp_path, "ebb", "flow"):
        tasks = [Task(path, changes, tmp_path / "runs" / path.stem, stage, True) for stage in ("validate", "compile")]
        outcomes = [fleet.perform(task) for task in tasks]
        assert [outcome["stage"] for outcome in outcomes] == ["validate", "compile"]
        assert [outcome["verdict"] for outcome in outcomes] == ["fail", "fail"]
        assert (tmp_path / "runs" / path.stem / "merged" / f"{path.stem}-bias-fp32" / "model.safetensors").exists()
    assert loads == ["ebb"]
    broken = fleet.perform(Task(path, ("validate.layers=[77]",), tmp_path / "runs" / "flow", "validate", True))
    assert broken["state"] == "error"
    assert "validate.layers: 77 not in this model" in broken["problems"][0]


def test_a_recipe_whose_workers_keep_ending_is_given_up() -> None:
    task, row = Task(Path("x"), (), Path("y"), "compile", False), Row("x", "m")
    for lost in (1, 2):
        row = fleet._after(row, task, None, 3)
        assert (row.state, row.lost_workers) == ("", lost)
    row = fleet._after(row, task, None, 3)
    assert (row.state, row.stage) == ("error", "compile")
    assert "3 workers ended in compile" in row.problems[0]


def test_what_cannot_run_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = recipes(tmp_path, "ebb", "flow")
    other.write_text(other.read_text(encoding="utf-8").replace("name: flow", "name: ebb"), encoding="utf-8")
    with pytest.raises(RecipeError, match="are both called ebb, and would write to one folder; rename one"):
        run_fleet([one, other], tmp_path / "runs")
    with pytest.raises(RecipeError, match="--engine slurm is unknown; use local or ray"):
        run_fleet([one], tmp_path / "runs", engine="slurm")
    if importlib.util.find_spec("ray") is None:
        monkeypatch.setattr(
            sys, "argv", ["compile-steer", "fleet", str(one), "--engine", "ray", "--out", str(tmp_path / "r")]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert (
            "needs the library ray, which is not installed: pip install 'compile-steer[fleet]'"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "runs").exists()
