"""Many recipes over a few workers: each recipe's stages are tasks, done in order; a worker keeps the last base that it loaded.

What a task has done lies on disk, and a run resumes from there. So a task whose worker ended (killed, out of memory, its
machine gone) is simply given to another one. An engine starts workers, hands them tasks, and says what became of them;
`local` has them as processes of this machine, `ray` as actors of a Ray cluster, which see the same disk or share storage.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol

from compile_steer.artifacts.files import save_json
from compile_steer.artifacts.locks import locked
from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.storage import TABLE, put_table, synced
from compile_steer.common.errors import CompileSteerError, InternalError, RecipeError, require_library
from compile_steer.common.progress import Progress
from compile_steer.recipe import Recipe, read_recipe

STAGES = {"validate": 1, "compile": 3, "verify": None}  # how many results of `run_stages` each ends after


@dataclass(frozen=True)
class Task:
    """One stage of one recipe, whose paths are absolute."""

    recipe: Path
    changes: tuple[str, ...]
    out: Path
    stage: str
    force: bool
    store: str = ""


@dataclass(frozen=True)
class Row:
    """What a recipe has come to: the last stage that was tried, and all problems if that failed.

    `state` is 'passed', 'failed' (a check: the validation, or no artifact is the steered model) or 'error'.
    """

    name: str
    model: str
    stage: str = "validate"
    state: Literal["passed", "failed", "error", ""] = ""
    verdict: str = ""
    headline: str = ""
    ship: str = ""
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    lost_workers: int = 0


@dataclass(frozen=True)
class Fleet:
    """The rows of all recipes, in the order in which they were given."""

    rows: list[Row]
    engine: str
    workers: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every recipe passed all its checks."""
        return all(row.state == "passed" for row in self.rows)


class Engine(Protocol):
    """Workers, numbered from 0."""

    def submit(self, worker: int, task: Task) -> None:
        """Hand an idle worker a task; one that has ended is started again."""

    def next(self) -> tuple[int, dict[str, Any] | None]:
        """Wait for a worker; returns what `perform` returned, None where it ended before."""

    def close(self) -> None:
        """End all workers."""


def run_fleet(
    recipes: Sequence[Path],
    out: Path,
    changes: Sequence[str] = (),
    *,
    engine: str = "local",
    workers: int = 2,
    tries: int = 3,
    force: bool = False,
    store: str = "",
    report: Callable[[str], None] = lambda _line: None,
) -> Fleet:
    """Run every recipe to the end, each into `out`/NAME; leaves the table in `out`/fleet.json.

    Args:
        tries: how many workers may end in one task before its recipe is given up.
        store: the URL of storage that each recipe's folder is fetched from and put to, task by task.
        report: is told what has become of each stage.

    Raises:
        RecipeError: a recipe cannot be read, two have one name, or there is no such engine. Nothing has run then.
    """
    if engine not in _ENGINES:
        raise RecipeError(f"--engine {engine} is unknown; use {' or '.join(_ENGINES)}.")
    started = time.perf_counter()
    read = _read_all(recipes, changes)
    rows = {real_path(path): Row(recipe.name, recipe.model) for path, recipe in read.items()}
    tasks = [
        Task(path, tuple(changes), real_path(out) / row.name, "validate", force, store) for path, row in rows.items()
    ]
    running, warm = dict[int, Task](), dict[int, str]()
    with locked(out), closing(_ENGINES[engine](min(workers, len(tasks)))) as pool:
        put_table(store, asdict(Fleet([*rows.values()], engine, workers, 0.0)))
        while tasks or running:
            for worker in range(min(workers, len(rows))):
                if worker not in running and tasks:
                    # A recipe that has begun comes first; then one whose base this worker has.
                    task = min(tasks, key=lambda t: (t.stage == "validate", rows[t.recipe].model != warm.get(worker)))
                    tasks.remove(task)
                    running[worker], warm[worker] = task, rows[task.recipe].model
                    pool.submit(worker, task)
            worker, outcome = pool.next()
            task = running.pop(worker)
            if outcome is None:
                del warm[worker]
            row = rows[task.recipe] = _after(rows[task.recipe], task, outcome, tries)
            if not row.state:
                following = task.stage if outcome is None else dict(pairwise(STAGES))[task.stage]
                tasks.insert(0, replace(task, stage=following))
            state = row.state or ("its worker ended; given to another" if outcome is None else "done")
            report("; ".join([f"{row.name}: {task.stage}: {state}", *row.problems]))
            fleet = Fleet([*rows.values()], engine, workers, time.perf_counter() - started)
            save_json(out / TABLE, asdict(fleet))
            put_table(store, asdict(fleet), report)
    return fleet


def _after(row: Row, task: Task, outcome: dict[str, Any] | None, tries: int) -> Row:
    """The row of a recipe after a task, whose worker ended where there is no outcome."""
    if outcome is not None:
        return replace(row, **{**outcome, "seconds": row.seconds + outcome["seconds"]})
    row = replace(row, lost_workers=row.lost_workers + 1)
    if row.lost_workers < tries:
        return row
    problem = f"{row.lost_workers} workers ended in {task.stage}: killed, or out of memory? See what they wrote, or the system's log."
    return replace(row, stage=task.stage, state="error", problems=[problem])


def _read_all(recipes: Sequence[Path], changes: Sequence[str]) -> dict[Path, Recipe]:
    read, problems = dict[Path, Recipe](), list[str]()
    for path in dict.fromkeys(recipes):
        try:
            read[path] = read_recipe(path, changes)
        except RecipeError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
    names: dict[str, Path] = {}
    for path, recipe in read.items():
        if (other := names.setdefault(recipe.name, path)) != path:
            problems.append(
                f"{other} and {path} are both called {recipe.name}, and would write to one folder; rename one."
            )
    if problems:
        raise RecipeError(problems)
    return read


_warm: dict[str, Any] = {}  # the base that was loaded last, by what it was loaded with


def perform(task: Task) -> dict[str, Any]:
    """Do one stage, after those before it, which are kept where they are on disk already; returns values of a `Row`."""
    from compile_steer.pipeline.run import Run, load_base
    from compile_steer.pipeline.stages import run_stages

    started = time.perf_counter()
    values: dict[str, Any] = {"stage": task.stage}
    try:
        recipe = read_recipe(task.recipe, task.changes)
        with locked(task.out), synced(task.out, task.store):
            key = repr(recipe.part("model", "device", "device_map", "dtype", "prompt_format") | {"chat": recipe.chat})
            if key not in _warm:
                _warm.clear()  # one base: two may not fit
                _warm[key] = load_base(recipe)
            run = Run.open(recipe, task.out, Progress(), _warm[key])
            for result in islice(run_stages(run, task.recipe, task.changes, task.force), STAGES[task.stage]):
                values |= {"verdict": result.validation.verdict, "headline": result.validation.headline}
                if result.recommendation is not None:
                    values |= {"state": "passed" if result.passed else "failed", "ship": result.recommendation.artifact}
            if values["verdict"] == "fail" and not task.force:
                values["state"] = "failed"
    except CompileSteerError as error:
        values |= {"state": "error", "problems": list(error.problems)}
    except (InternalError, OSError, MemoryError) as error:
        values |= {"state": "error", "problems": [f"{type(error).__name__}: {error}"]}
    return {**values, "seconds": time.perf_counter() - started}


def _serve(pipe: Connection, number: int, threads: int) -> None:
    """Do the tasks that come through the pipe, until it closes."""
    import torch

    if gpus := torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    torch.set_num_threads(threads)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(perform(task))


class LocalEngine:
    """Workers as processes of this machine, with its GPUs and cores shared among them."""

    def __init__(self, workers: int) -> None:
        # A server that has imported everything and does nothing else, so that a worker is there in an instant.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["compile_steer.pipeline.stages", "compile_steer.tools.fleet"])
        self._threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or (os.cpu_count() or 1) // workers))
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._running: dict[Any, int] = {}  # the pipes of those that have a task

    def submit(self, worker: int, task: Task) -> None:
        if worker not in self._processes or not self._processes[worker].is_alive():  # an idle one may have been killed
            self._pipes[worker], theirs = self._context.Pipe()
            args = theirs, worker, self._threads
            process = self._processes[worker] = self._context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
        with suppress(OSError):  # where it has ended since, `next` says so
            self._pipes[worker].send(task)
        self._running[self._pipes[worker]] = worker

    def next(self) -> tuple[int, dict[str, Any] | None]:
        worker = self._running.pop(wait(list(self._running))[0])
        try:
            return worker, self._pipes[worker].recv()
        except (EOFError, ConnectionResetError):
            self._processes[worker].join()
            return worker, None

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
            process.join()


class RayEngine:
    """Workers as actors of a Ray cluster: the one that RAY_ADDRESS names, or a new one of this machine."""

    def __init__(self, workers: int) -> None:
        require_library("ray", "fleet", "--engine ray", "Or use --engine local.")
        import ray

        self._ray: Any = ray
        self._running: dict[Any, int] = {}
        self._actors: dict[int, Any] = {}
        cores = None if os.environ.get("RAY_ADDRESS") else max(workers, os.cpu_count() or 1)
        ray.init(ignore_reinit_error=True, log_to_driver=False, num_cpus=cores)
        gpus = ray.cluster_resources().get("GPU", 0)
        self._options = {"num_cpus": 1, "num_gpus": min(1.0, gpus / workers) if gpus else 0, "max_restarts": 0}

    def submit(self, worker: int, task: Task) -> None:
        if worker not in self._actors:
            self._actors[worker] = self._ray.remote(_Actor).options(**self._options).remote()
        self._running[self._actors[worker].perform.remote(task)] = worker

    def next(self) -> tuple[int, dict[str, Any] | None]:
        (ready, *_), _others = self._ray.wait(list(self._running))
        worker = self._running.pop(ready)
        try:
            return worker, self._ray.get(ready)
        except self._ray.exceptions.RayError:
            self._actors.pop(worker)
            return worker, None

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)


class _Actor:
    def perform(self, task: Task) -> dict[str, Any]:
        return perform(task)


_ENGINES: dict[str, Callable[[int], Engine]] = {"local": LocalEngine, "ray": RayEngine}
