"""The command line: one command a span of the walk, and `run` for the whole of it.

Exit codes: 0 done and passed; 1 a check ran and failed; 2 the input is unusable or the run was stopped.
Errors become messages in `compile_steer.__main__`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compile_steer import forms, pipeline, processes
from compile_steer.describe import describe_artifact
from compile_steer.exchange import Import, new_recipe, run_export, run_import
from compile_steer.on_artifact import audit_, push, reproduce_, show
from compile_steer.on_several import compose_, together
from compile_steer.recombine import Recombination, recombine
from compile_steer.report import (
    print_decompiled,
    print_parities,
    print_plan,
    print_recombined,
    print_samples,
    print_validation,
    print_writing,
    write_page,
)
from compile_steer.run import load_program
from compile_steer.session import Command, Session

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn a steering vector into ordinary weights, and prove that they match.\n\n"
    "Start with: **compile-steer run recipes/ocean.yaml**. It extracts a direction from contrast pairs, says on "
    "held-out prompts whether it is worth anything, compiles it (bias, LoRA adapter, merged checkpoint) and judges "
    "in a fresh process whether what is on disk behaves as the hooked model did.",
)

Force = Annotated[bool, typer.Option(help="Compile in spite of a failed or missing validation; the artifact says so.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Progress bars only, no tables.")]
Convention = Annotated[
    str | None,
    typer.Option(help="What number k in the file is of: block, the output of block k; hidden_state, hidden_states[k]."),
]


@app.command()
@Command
def write(session: Session) -> None:
    """Have the model write its own contrast pairs, and keep those in which the scorer finds the behaviour.

    For data of kind written or instructions; every later command does this first. Leaves data/NAME.SPLIT.jsonl, which
    may be edited: the files are kept until the prompts, what is asked, the scorer or the model change.
    """
    run = session.open()
    report = pipeline.run_write(run)
    session.finish(asdict(report), lambda: print_writing(session.console, report, run.places.writing.parent))


@app.command()
@Command
def extract(session: Session) -> None:
    """Read a direction off contrast pairs, at every block of the model in one pass."""
    run = session.open()
    pipeline.run_extract(run)
    path = run.places.directions
    session.finish(describe_artifact(path), lambda: session.console.print(f"Directions: {path}"))


@app.command()
@Command
def validate(session: Session) -> None:
    """Choose layer and coefficient on validation data, measure once on test data, and give a verdict.

    Extracts first if that was not done. Exit code 1 if the verdict is not "pass".
    """
    report = pipeline.run_validate(session.open())
    session.finish(asdict(report), lambda: print_validation(session.console, report))
    raise typer.Exit(0 if report.verdict == "pass" else 1)


@app.command("compile")
@Command
def compile_(session: Session, *, force: Force = False) -> None:
    """Turn the validated program into weights: a bias, a LoRA by regression or distillation, or a task vector."""
    processes.join()
    run = session.open()
    choices = pipeline.run_plan(run)
    if not session.as_json:
        print_plan(session.console, load_program(run).describe(), choices)
    folders = pipeline.run_compile(run, force)
    processes.leave()
    session.finish([str(folder) for folder in folders], lambda: _list(session, folders))


@app.command()
@Command
def merge(
    session: Session,
    *,
    artifact: Annotated[
        list[Path] | None, typer.Option(help="Folder of a patch; by default all that the recipe makes. Repeatable.")
    ] = None,
) -> None:
    """Write stock checkpoints with the compiled weights summed in (fp32 sum, one cast)."""
    folders = forms.run_merge(session.open(), artifact or ())
    session.finish([str(folder) for folder in folders], lambda: _list(session, folders))


@app.command()
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
    parities = forms.run_verify(run, artifact or forms.artifacts(run))
    shown = (lambda: None) if only_bars else lambda: print_parities(session.console, parities)
    session.finish([asdict(parity) for parity in parities], shown)
    raise typer.Exit(0 if all(parity.passed for parity in parities) else 1)


@app.command()
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
    forms.run_merge(opened)
    session.heading("3  Is what is on disk the steered model? (a fresh process)")
    code = forms.verify_in_fresh_process(session.path, session.out, session.changes)
    if code not in (0, 1):
        raise typer.Exit(code)
    parities = forms.read_parities(opened)
    print_parities(session.console, parities)
    print_samples(session.console, session.recipe.ask, report, parities, session.recipe.too_high)
    curves = pipeline.read_curves(opened)
    write_page(opened.places.report, session.recipe, program, choices, report, parities, curves)
    session.console.print(f"\nArtifacts in {session.out}/, the whole run as a page in {opened.places.report}")
    session.finish({"validation": asdict(report), "parities": [asdict(parity) for parity in parities]})
    raise typer.Exit(code)


@app.command("import")
@Command
def import_(
    session: Session,
    *,
    file: Annotated[Path, typer.Option("--from", help="A vector's file or folder, of another tool.")],
    to: Annotated[str, typer.Option(help="Name of the new recipe, written beside the given one.")],
    kind: Annotated[str | None, typer.Option("--format", help="Of the file. [default: told by its name]")] = None,
    layer_convention: Convention = None,
    layer: Annotated[int | None, typer.Option(help="The block of a bare tensor.")] = None,
    index: Annotated[int | None, typer.Option(help="The row of a dictionary of features or concepts.")] = None,
    joint: Annotated[str | None, typer.Option(help="Blocks added all at once: all, or 4,5,6.")] = None,
) -> None:
    """Start from a vector that another tool made: repeng, steering-vectors, CAA, persona vectors, SAEs and more.

    Checks the file against the model and writes a recipe like the given one, whose directions are the file's. What
    follows is as for any recipe: validate, compile, verify.
    """
    wanted = Import(file, to, kind, layer_convention, layer, index, joint)
    session = session.changed(wanted.changes(session.path))
    made = new_recipe(session.recipe, session.path, session.changes)
    opened = session.open()
    run_import(opened, made)
    told = f"Recipe: {made.path}; next: compile-steer validate {made.path}"
    found = {"recipe": str(made.path), **describe_artifact(opened.places.directions)}
    session.finish(found, lambda: session.console.print(told))


@app.command("export-vector")
@Command
def export_vector(
    session: Session,
    *,
    kind: Annotated[str, typer.Option("--format", help="gguf (llama.cpp, repeng, EasySteer) or svec.")] = "gguf",
    to: Annotated[Path | None, typer.Option(help="The new file. [default: vectors/NAME.gguf or .svec]")] = None,
    layer_convention: Convention = None,
) -> None:
    """Write the program, uncompiled, as a vector for tools that steer with hooks.

    Refused where the format cannot hold it: such files are added at every position to the output of blocks.
    """
    path, told = run_export(session.open(), kind, to, layer_convention)
    shown = [f"Vector: {path}", *told]
    session.finish({"file": str(path), "notes": told}, lambda: session.console.print("\n".join(shown)))


@app.command("decompile")
@Command
def decompile_(
    session: Session,
    *,
    artifact: Annotated[Path, typer.Option(help="An adapter for the recipe's model, or a fine-tuned copy of it.")],
) -> None:
    """Read a steering program off an adapter or fine-tuned checkpoint, and say how much of it that explains.

    The way back from weights to vectors; ours or anybody's. Leaves vectors/NAME.decompiled.safetensors.
    """
    opened = session.open()
    found = pipeline.run_decompile(opened, artifact)
    known = load_program(opened) if opened.places.program.is_file() else None
    session.finish(found.summary(), lambda: print_decompiled(session.console, found, known))


@app.command("task-vector")
@Command
def task_vector(
    session: Session,
    *,
    artifact: Annotated[Path, typer.Option(help="Folder of a compiled patch or adapter.")],
    scale: Annotated[float, typer.Option(help="Factor on it; -1 takes away what it gives.")] = 1.0,
    add: Annotated[list[Path] | None, typer.Option(help="Folder of another patch, added as it is. Repeatable.")] = None,
    cut: Annotated[int | None, typer.Option(help="Cut every matrix to this rank, for a stock LoRA adapter.")] = None,
    to: Annotated[str, typer.Option(help="The new patch is adapters/NAME-TO.")] = "task_vector",
) -> None:
    """Scale, negate, add and cut what was compiled, as arithmetic on weights; and say what is in it.

    W_new - W_base of one base can be added to another's. Nothing validates the result: verify it.
    """
    opened = session.open()
    known = load_program(opened) if opened.places.program.is_file() else None
    wanted = Recombination(artifact, scale, tuple(add or ()), cut, to)
    found = recombine(wanted, opened.loaded, opened.places, known)
    session.finish(found.summary(), lambda: print_recombined(session.console, found))


app.command("compose")(compose_)
app.command()(together)
app.command()(show)
app.command("reproduce")(reproduce_)
app.command("audit")(audit_)
app.command()(push)


def _list(session: Session, folders: list[Path]) -> None:
    for folder in folders:
        session.console.print(f"  {folder}")
