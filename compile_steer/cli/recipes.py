"""The commands on a recipe: one a span of the walk, and `run` for the whole of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compile_steer import artifact_formats, pipeline
from compile_steer.cli.options import Command, Session
from compile_steer.common import distributed
from compile_steer.report.page import write_page
from compile_steer.report.terminal import print_parities, print_plan, print_samples, print_validation, print_writing
from compile_steer.run import load_program
from compile_steer.tools.describe import describe_artifact

Force = Annotated[bool, typer.Option(help="Compile in spite of a failed or missing validation; the artifact says so.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Progress bars only, no tables.")]


@Command
def write(session: Session) -> None:
    """Have the model write its own contrast pairs, and keep those in which the scorer finds the behaviour.

    For data of kind written or instructions; every later command does this first. Leaves data/NAME.SPLIT.jsonl, which
    may be edited: the files are kept until the prompts, what is asked, the scorer or the model change.
    """
    run = session.open()
    report = pipeline.run_write(run)
    session.finish(asdict(report), lambda: print_writing(session.console, report, run.paths.writing.parent))


@Command
def extract(session: Session) -> None:
    """Read a direction off contrast pairs, at every block of the model in one pass."""
    run = session.open()
    pipeline.run_extract(run)
    path = run.paths.directions
    session.finish(describe_artifact(path), lambda: session.console.print(f"Directions: {path}"))


@Command
def validate(session: Session) -> None:
    """Choose layer and coefficient on validation data, measure once on test data, and give a verdict.

    Extracts first if that was not done. Exit code 1 if the verdict is not "pass".
    """
    report = pipeline.run_validate(session.open())
    session.finish(asdict(report), lambda: print_validation(session.console, report))
    raise typer.Exit(0 if report.verdict == "pass" else 1)


@Command
def compile_(session: Session, *, force: Force = False) -> None:
    """Turn the validated program into weights: a bias, a LoRA by regression or distillation, or a task vector."""
    distributed.join()
    run = session.open()
    choices = pipeline.run_plan(run)
    if not session.as_json:
        print_plan(session.console, load_program(run).describe(), choices)
    folders = pipeline.run_compile(run, force)
    distributed.leave()
    session.finish([str(folder) for folder in folders], lambda: _list(session, folders))


@Command
def merge(
    session: Session,
    *,
    artifact: Annotated[
        list[Path] | None, typer.Option(help="Folder of a patch; by default all that the recipe makes. Repeatable.")
    ] = None,
) -> None:
    """Write stock checkpoints with the compiled weights summed in (fp32 sum, one cast)."""
    folders = artifact_formats.run_merge(session.open(), artifact or ())
    session.finish([str(folder) for folder in folders], lambda: _list(session, folders))


@Command
def verify(
    session: Session,
    *,
    artifact: Annotated[
        list[Path] | None, typer.Option(help="Folder to judge; by default all that the recipe makes. Repeatable.")
    ] = None,
    only_bars: Quiet = False,
) -> None:
    """Reload what is on disk and hold it against the hooked model, on prompts nobody trained on.

    Leaves a parity.json beside each artifact. Exit code 1 if any of them is not the steered model.
    """
    run = session.open()
    parities = artifact_formats.run_verify(run, artifact or artifact_formats.artifacts(run))
    shown = (lambda: None) if only_bars else lambda: print_parities(session.console, parities)
    session.finish([asdict(parity) for parity in parities], shown)
    raise typer.Exit(0 if all(parity.passed for parity in parities) else 1)


@Command
def run(session: Session, *, force: Force = False) -> None:
    """The whole walk: extract, validate, compile, merge, verify in a fresh process, report.

    What is there already and was made from the same inputs is kept, so a stopped run goes on where it was.
    Exit code 1 if the validation fails (unless --force) or an artifact is not the steered model.
    """
    session.heading(f"1  Is the direction worth compiling? ({session.recipe.model})")
    opened = session.open()
    report = pipeline.run_validate(opened)
    print_validation(session.console, report)
    if report.verdict == "fail" and not force:
        session.finish({"validation": asdict(report), "parities": []})
        raise typer.Exit(1)
    session.heading("2  Into weights")
    choices = pipeline.run_plan(opened)
    program = load_program(opened).describe()
    print_plan(session.console, program, choices)
    pipeline.run_compile(opened, force)
    artifact_formats.run_merge(opened)
    session.heading("3  Is what is on disk the steered model? (a fresh process)")
    code = artifact_formats.verify_in_fresh_process(session.path, session.out, session.changes)
    if code not in (0, 1):
        raise typer.Exit(code)
    parities = artifact_formats.read_parities(opened)
    print_parities(session.console, parities)
    print_samples(session.console, session.recipe.ask, report, parities, session.recipe.too_high)
    curves = pipeline.read_curves(opened)
    write_page(opened.paths.report, session.recipe, program, choices, report, parities, curves)
    session.console.print(f"\nArtifacts in {session.out}/, the whole run as a page in {opened.paths.report}")
    session.finish({"validation": asdict(report), "parities": [asdict(parity) for parity in parities]})
    raise typer.Exit(code)


def _list(session: Session, folders: list[Path]) -> None:
    for folder in folders:
        session.console.print(f"  {folder}")
