"""The commands on a recipe: one a stage, and `run` for all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compile_steer.cli.options import Artifacts, Force, Json, Session, command, finish, print_title, progress_bars
from compile_steer.common.detail import Detail, detail

if TYPE_CHECKING:
    from rich.console import Console

    from compile_steer.lowering.plan import Choice
    from compile_steer.tools.new_recipe import NewRecipe
    from compile_steer.validation.report import ValidationReport
    from compile_steer.verification.parity import Parity


def new(
    name: Annotated[str, typer.Argument(help="Of the behaviour, and of the files that are written.")],
    behaviour: Annotated[
        str, typer.Option(help='What the model is to do: "speaks like a pirate". [default: as the pairs show it]')
    ] = "",
    pairs: Annotated[
        Path | None,
        typer.Option("--from", help="Your pairs: .jsonl, .json, .csv or .parquet. [default: the model writes them]"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A hub id in the cache, a folder, a .gguf file.")
    ] = "smollm2-135m-instruct",
    out: Annotated[Path, typer.Option(help="Folder for NAME.yaml and data/NAME/.")] = Path("recipes"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe and data of this name.")] = False,
    as_json: Json = False,
) -> None:
    """Write a recipe for a behaviour of your own: its pairs in three splits, a score, and a default for all else.

    The pairs are yours (--from), or the model writes them: asked for the behaviour and not. Prints what to run next.
    """
    from compile_steer.tools.new_recipe import new_recipe

    def show(out: Console, new: NewRecipe) -> None:
        out.print(f"Recipe: {new.path}", ", ".join(f"{n} pairs for {split}" for split, n in new.rows.items()), sep="\n")
        out.print(f"Score: {new.score}", new.power, f"Next: {new.next}", sep="\n", markup=False, highlight=False)

    finish(as_json, new_recipe(name, behaviour, pairs, model, out, progress_bars(), overwrite), show)


def schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them; `new` writes it beside its recipe."""
    from compile_steer.tools.new_recipe import recipe_schema

    finish(True, recipe_schema())


@command(Session)
def generate_pairs(session: Session) -> None:
    """Let the model generate its own contrast pairs, and keep those in which the scorer finds the behaviour.

    For data of kind generated or instructions; every later command does this first. Leaves data/NAME.SPLIT.jsonl, which
    may be edited: the files are kept until the prompts, the templates, the scorer or the model change.
    """
    from compile_steer.report.terminal import print_generation

    run = session.open(shared=True)
    folder = run.paths.generation_report.parent
    session.finish(run.generated_pairs(), lambda out, report: print_generation(out, report, folder))


@command(Session)
def extract(session: Session) -> None:
    """Read a direction from contrast pairs, at every block of the model in one pass."""
    from compile_steer.tools.describe import describe_artifact

    run = session.open(shared=True)
    run.extract()
    path = run.paths.directions
    session.finish(describe_artifact(path), lambda out, _summary: out.print(f"Directions: {path}"))


@command(Session)
def validate(session: Session) -> None:
    """Choose layer and coefficient on validation data, measure once on test data, and give a verdict.

    Extracts first if that was not done. Exit code 1 if the verdict is not "pass".
    """
    report = session.open(shared=True).validate()
    session.finish(report, lambda out, report: _print_validation(out, report, session), report.verdict == "pass")


@command(Session)
def compile_(session: Session, *, force: Force = False) -> None:
    """Turn the validated program into weights: a bias, a LoRA by regression or distillation, or a task vector."""
    from compile_steer.pipeline.artifacts import compile_program

    run = session.open(shared=True)
    if not session.as_json:
        _print_plan(session.console, run.program.describe(), run.plan.choices)
    folders = compile_program(run, force)
    session.finish(folders, _print_paths)


@command(Session)
def merge(session: Session, *, artifact: Artifacts = None) -> None:
    """Write stock checkpoints with the compiled weights summed in (float32 sum, one cast)."""
    from compile_steer.pipeline import artifacts

    session.finish(artifacts.merge(session.open(shared=True), artifact or ()), _print_paths)


def _print_validation(out: Console, report: ValidationReport, session: Session) -> None:
    from compile_steer.report import brief, terminal

    if detail.get() == Detail.QUIET:
        out.print(f"{report.verdict.upper()}; {report.headline}", soft_wrap=True)
    elif detail.get() == Detail.VERBOSE:
        terminal.print_validation(out, report)
    else:
        brief.print_sweep(out, report)
        brief.print_verdict(out, report, session.recipe.validate_)


def _print_plan(out: Console, program: str, choices: Sequence[Choice]) -> None:
    from compile_steer.report import brief, terminal

    if detail.get() == Detail.VERBOSE:
        terminal.print_plan(out, program, choices)
    elif detail.get() == Detail.NORMAL:
        brief.print_methods(out, choices)


def _print_parities(out: Console, parities: Sequence[Parity]) -> None:
    from compile_steer.report import brief, terminal

    if detail.get() == Detail.QUIET:
        out.print(*(f"{p.backend} {p.form}: {p.verdict}" for p in parities), sep="\n", soft_wrap=True)
    elif detail.get() == Detail.VERBOSE:
        terminal.print_parities(out, parities)
    else:
        brief.print_artifacts(out, parities)


def _print_paths(out: Console, paths: Sequence[Path]) -> None:
    out.print(*(f"  {path}" for path in paths), sep="\n")


@command(Session)
def verify(session: Session, *, artifact: Artifacts = None) -> None:
    """Reload what is on disk and compare it with the steered model, on prompts that nothing was fitted to.

    Leaves a parity.json beside each artifact. Exit code 1 if any of them is not the steered model.
    """
    from compile_steer.pipeline import artifacts

    run = session.open(shared=True)
    parities = artifacts.verify(run, artifact or artifacts.artifacts(run))
    session.finish(parities, _print_parities, all(parity.passed for parity in parities))


@command(Session)
def run(
    session: Session,
    *,
    force: Annotated[bool, typer.Option(help="Go on after a failed validation; the artifacts say so.")] = False,
) -> None:
    """Run every stage: extract, validate, compile, merge, verify in a fresh process, report.

    What is there already and was made from the same inputs is kept, so that a stopped run goes on where it was.
    Exit code 1 if the validation fails (unless --force) or an artifact is not the steered model.
    """
    from compile_steer.pipeline.estimate import estimate
    from compile_steer.pipeline.memory import peak_memory
    from compile_steer.pipeline.stages import run_stages
    from compile_steer.report import brief, terminal

    recipe, out = session.recipe, session.console

    title = functools.partial(print_title, out)
    opened = session.open(shared=True)
    if detail.get() > Detail.QUIET and not opened.paths.validation.is_file():  # what is there already takes no time
        peak = peak_memory(Path(opened.model.source), recipe, opened.data)
        memory = "" if peak is None else f" and {peak / 2**30:.1f} GiB of memory"
        out.print(f"from nothing about {max(estimate(opened), 1):.0f} min{memory}; a stopped run goes on")
    title("1  Does the direction carry the behaviour?")
    for result in run_stages(opened, session.path, session.changes, force):
        if (shipped := result.recommendation) is not None:  # the last result; each holds those before it
            _print_parities(out, result.parities)
            if detail.get() == Detail.VERBOSE:
                terminal.print_samples(out, recipe.ask, result.validation, result.parities, recipe.too_high)
                terminal.print_recommendation(out, shipped)
            elif detail.get() == Detail.NORMAL:
                brief.print_answers(out, recipe.ask, result.validation, result.parities)
            brief.print_end(out, shipped, opened.paths)
        elif result.merged:
            title("3  Are the files on disk the steered model?")
        elif result.plan:
            title("2  Into ordinary weights")
            _print_plan(out, opened.program.describe(), result.plan)
        else:
            _print_validation(out, result.validation, session)
    values = {"validation": result.validation, "parities": result.parities, "recommendation": result.recommendation}
    session.finish(values, passed=result.passed)
