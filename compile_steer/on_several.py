"""The commands on several recipes at once: their adapters judged as they are loaded together, or composed into one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from compile_steer.compose import Composition
from compile_steer.report import print_composition
from compile_steer.session import Device, Dtype, Json, Seed, Session, Set
from compile_steer.several import Several, joined, run_compose, run_together

Recipes = Annotated[list[Path], typer.Argument(help="The recipes, two or more, compiled already.")]
Backend = Annotated[str, typer.Option(help="Whose adapters are put together.")]
Dials = Annotated[list[float] | None, typer.Option("--dial", help="Factor of each program, in order. [default: 1]")]
Runs = Annotated[Path, typer.Option(help="Folder that holds each recipe's run, as NAME.")]
Out = Annotated[Path | None, typer.Option(help="Folder for composed/. [default: RUNS/NAME1+NAME2]")]


def compose_(
    recipes: Recipes,
    backend: Backend = "closed_form",
    dial: Dials = None,
    runs: Runs = Path("runs"),
    out: Out = None,
    changes: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Put several compiled programs into one adapter, stacked and compiled jointly, and say how they interfere.

    Settings (--set and the like) are of every recipe; the joint compile takes the first one's. Exit code 1 if an
    adapter is not the model under all hooks at once.
    """
    session = functools.partial(Session, changes=changes, device=device, dtype=dtype, seed=seed, as_json=as_json)
    first, several = _open([session(recipe=path) for path in recipes], backend, dial, runs, out)
    _finish(first, run_compose(several))


def together(
    recipes: Recipes,
    backend: Backend = "closed_form",
    dial: Dials = None,
    runs: Runs = Path("runs"),
    out: Out = None,
    changes: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Load several recipes' adapters in PEFT at once, all on, and hold them against all programs' hooks at once.

    Nothing is compiled; compose makes one adapter of them. Exit code 1 if they are not the model under all hooks.
    """
    session = functools.partial(Session, changes=changes, device=device, dtype=dtype, seed=seed, as_json=as_json)
    first, several = _open([session(recipe=path) for path in recipes], backend, dial, runs, out)
    _finish(first, run_together(several))


def _open(
    sessions: list[Session], backend: str, dials: list[float] | None, runs: Path, out: Path | None
) -> tuple[Session, Several]:
    """The first session, which speaks, and what they come to."""
    first, read = sessions[0], [one.recipe for one in sessions]
    return first, Several.open(read, dials or [], backend, runs, out or runs / joined(read), first.meter)


def _finish(session: Session, found: Composition) -> None:
    session.finish(found.summary(), lambda: print_composition(session.console, found))
    raise typer.Exit(0 if found.passed else 1)
