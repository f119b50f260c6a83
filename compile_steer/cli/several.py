"""The commands on several recipes at once: their adapters judged as they are loaded together, or composed into one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compile_steer.cli.options import Session
from compile_steer.cli.tables import print_composition
from compile_steer.tools.compose import Several, joined, run_compose, run_together
from compile_steer.tools.interference_report import Composition

Recipes = Annotated[list[Path], typer.Argument(help="The recipes, two or more, compiled already.")]
Backend = Annotated[str, typer.Option(help="Whose adapters are put together.")]
Dials = Annotated[list[float] | None, typer.Option("--dial", help="Factor of each program, in order. [default: 1]")]
Runs = Annotated[Path, typer.Option(help="Folder that holds each recipe's run, as NAME.")]
Out = Annotated[Path | None, typer.Option(help="Folder for composed/. [default: RUNS/NAME1+NAME2]")]


def _opened(
    recipes: Recipes,
    backend: Backend = "closed_form",
    dial: Dials = None,
    runs: Runs = Path("runs"),
    out: Out = None,
    **settings: Any,
) -> tuple[Session, Several]:
    """The first recipe's session, which speaks, and what all of them come to; `settings` are a session's, of every one."""
    sessions = [Session(recipe=path, **settings) for path in recipes]
    first, read = sessions[0], [one.recipe for one in sessions]
    return first, Several.open(read, dial or [], backend, runs, out or runs / joined(read), first.progress)


class _Command:
    """What is done to several as a command: exit code 1 if what it finds is not the model under all hooks at once."""

    def __init__(self, work: Callable[[Several], Composition]) -> None:
        functools.update_wrapper(self, work)
        self._work = work
        own, session = (inspect.signature(one, eval_str=True).parameters.values() for one in (_opened, Session))
        named = [one for one in own if one.kind is not one.VAR_KEYWORD]
        known = {one.name for one in named} | {"recipe"}
        shared = [one.replace(kind=one.POSITIONAL_OR_KEYWORD) for one in session if one.name not in known]
        self.__signature__ = inspect.Signature([*named, *shared])  # what typer reads

    def __call__(self, **given: Any) -> None:
        session, several = _opened(**given)
        found = self._work(several)
        session.finish(found.summary(), lambda: print_composition(session.console, found))
        raise typer.Exit(0 if found.passed else 1)


@_Command
def compose_(several: Several) -> Composition:
    """Put several compiled programs into one adapter, stacked and compiled jointly, and say how they interfere.

    Settings (--set and the like) are of every recipe; the joint compile takes the first one's. Exit code 1 if an
    adapter is not the model under all hooks at once.
    """
    return run_compose(several)


@_Command
def together(several: Several) -> Composition:
    """Load several recipes' adapters in PEFT at once, all on, and hold them against all programs' hooks at once.

    Nothing is compiled; compose makes one adapter of them. Exit code 1 if they are not the model under all hooks.
    """
    return run_together(several)
