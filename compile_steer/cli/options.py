"""What the commands on a recipe share: their options, and what these come to.

A command is a function of a `Session`; `Command` gives it the session's options before its own.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from compile_steer.common import distributed
from compile_steer.common.progress import Progress, ProgressBars
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.run import Run

RecipePath = Annotated[Path, typer.Argument(help="The recipe: a YAML file that names model, data and settings.")]
Out = Annotated[Path | None, typer.Option(help="Folder for vectors/, adapters/ and merged/. [default: runs/NAME]")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override any recipe key: path.to.key=value. Repeatable.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... (recipe key device).")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (recipe key dtype).")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (recipe key seed).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON for a program to read.")]


def person(as_json: bool) -> Console:
    """Where a person reads: standard error, where a program reads standard output. Of several processes one speaks."""
    return Console(stderr=as_json, width=None if sys.stdout.isatty() else 132, quiet=distributed.rank() > 0)


class Session:
    """One command's recipe, output folder and consoles; its arguments are options of every command on a recipe."""

    def __init__(
        self,
        *,
        recipe: RecipePath,
        out: Out = None,
        changes: Set = None,
        device: Device = None,
        dtype: Dtype = None,
        seed: Seed = None,
        as_json: Json = False,
    ) -> None:
        given = {"device": device, "dtype": dtype, "seed": seed}
        self.path = recipe
        self.changes = [*(changes or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
        self.recipe: Recipe = read_recipe(recipe, self.changes)
        self._given_out = out
        self.out = out or Path("runs") / self.recipe.name
        self.as_json = as_json
        self.console = person(as_json)
        self.progress: Progress = ProgressBars(self.console)

    def changed(self, changes: list[str]) -> Session:
        """The same with changes of the recipe, before those that were asked for; where it lies follows its name."""
        return Session(recipe=self.path, out=self._given_out, changes=[*changes, *self.changes], as_json=self.as_json)

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold blue]{text}[/bold blue]")

    def open(self) -> Run:
        return Run.open(self.recipe, self.out, self.progress)

    def finish(self, value: Any, show: Callable[[], None] = lambda: None) -> None:
        if self.as_json and distributed.rank() == 0:
            print(json.dumps(value, indent=2))
        else:
            show()


class Command:
    """A function of a session as a command: the options that make a session, then the function's own."""

    def __init__(self, work: Callable[..., None]) -> None:
        functools.update_wrapper(self, work)
        self._work = work
        shared, own = (list(inspect.signature(one, eval_str=True).parameters.values()) for one in (Session, work))
        self._shared = [parameter.name for parameter in shared]
        self.__signature__ = inspect.Signature([*shared, *own[1:]])  # what typer reads

    def __call__(self, **given: Any) -> None:
        session = Session(**{name: given.pop(name) for name in self._shared})
        self._work(session, **given)
