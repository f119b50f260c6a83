"""The commands on programs and patches: other tools' vectors, weights read back, and several programs at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_steer.cli.options import Force, Json, Session, Set, SeveralSession, command, console, finish, within
from compile_steer.common.errors import shell_word

Convention = Annotated[
    str | None,
    typer.Option(help="What number k in the file is of: block, the output of block k; hidden_state, hidden_states[k]."),
]


@command(Session)
def import_(
    session: Session,
    *,
    file: Annotated[Path, typer.Option("--from", help="A vector's file or folder, of another tool.")],
    to: Annotated[str, typer.Option(help="Name of the new recipe, written beside the given one.")],
    kind: Annotated[str | None, typer.Option("--format", help="Of the file. [default: by its name]")] = None,
    layer_convention: Convention = None,
    layer: Annotated[int | None, typer.Option(callback=within(0), help="The block of a bare tensor.")] = None,
    index: Annotated[
        int | None, typer.Option(callback=within(0, 1e9), help="The row of a dictionary of features or concepts.")
    ] = None,
    joint: Annotated[str | None, typer.Option(help="Blocks added all at once: all, or 4,5,6.")] = None,
) -> None:
    """Start from a vector that another tool made: repeng, steering-vectors, CAA, persona vectors, SAEs and more.

    Checks the file against the model and writes a recipe like the given one, whose directions are the file's. What
    follows is as for any recipe: validate, compile, verify.
    """
    from compile_steer.tools.describe import describe_artifact
    from compile_steer.tools.vector_files import import_changes, import_vector, new_recipe

    settings = {"format": kind, "layer_convention": layer_convention, "layer": layer, "index": index}
    session = session.changed(import_changes(session.path, file, to, joint, **settings))
    recipe, text = new_recipe(session.path, to, session.changes)
    run = session.open()
    import_vector(run, recipe, text)
    summary = {"recipe": recipe, **describe_artifact(run.paths.directions)}
    message = f"Recipe: {recipe}; next: compile-steer validate {shell_word(recipe)}"
    session.finish(summary, lambda out, _summary: out.print(message))


@command(Session)
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
    from compile_steer.tools import vector_files

    path, notes = vector_files.export_vector(session.open(), kind, to, layer_convention)
    session.finish({"file": path, "notes": notes}, lambda out, _: out.print(f"Vector: {path}", *notes, sep="\n"))


@command(Session)
def decompile(
    session: Session,
    *,
    artifact: Annotated[Path, typer.Option(help="An adapter for the recipe's model, or a fine-tuned copy of it.")],
) -> None:
    """Read a steering program off an adapter or fine-tuned checkpoint, and say how much of it that explains.

    The way back from weights to vectors; ours or anybody's. Leaves vectors/NAME.decompiled.safetensors.
    """
    from compile_steer.cli.tables import print_decompiled
    from compile_steer.tools.decompile import decompile_artifact

    run = session.open()
    decompiled = decompile_artifact(run, artifact)
    known = run.program if run.paths.program.is_file() else None
    session.finish(decompiled.summary(), lambda out, _summary: print_decompiled(out, decompiled, known))


@command(Session)
def task_vector(
    session: Session,
    *,
    artifact: Annotated[Path, typer.Option(help="Folder of a compiled patch or adapter.")],
    scale: Annotated[
        float, typer.Option(callback=within(-1e6), help="Factor on it; -1 takes away what it gives.")
    ] = 1.0,
    add: Annotated[list[Path] | None, typer.Option(help="Folder of another patch, added as it is. Repeatable.")] = None,
    cut: Annotated[
        int | None, typer.Option(callback=within(1), help="Cut every matrix to this rank, for a stock LoRA adapter.")
    ] = None,
    to: Annotated[str, typer.Option(help="The new patch is adapters/NAME-TO.")] = "task_vector",
) -> None:
    """Scale, negate, add and cut what was compiled, as arithmetic on weights; and say what is in it.

    W_new - W_base of one base can be added to another's. Nothing validates the result: verify it.
    """
    from compile_steer.cli.tables import print_task_vector
    from compile_steer.tools.task_vector import recombine

    session.finish(recombine(session.open(), [artifact, *(add or ())], scale, cut, to), print_task_vector)


@command(SeveralSession)
def compose(session: SeveralSession) -> None:
    """Put several compiled programs into one adapter, stacked and compiled jointly, and say how they interfere.

    Settings (--set and the like) are of every recipe; the joint compile takes the first one's. Exit code 1 if an
    adapter is not the model under all hooks at once.
    """
    from compile_steer.tools.compose import compose

    session.finish(compose(session.run))


@command(SeveralSession)
def co_load(session: SeveralSession) -> None:
    """Load several recipes' adapters in PEFT at once, all on, and compare them with all programs' hooks at once.

    Nothing is compiled; compose makes one adapter of them. Exit code 1 if they are not the model under all hooks.
    """
    from compile_steer.tools.compose import co_load

    session.finish(co_load(session.run))


def fleet(
    *,
    recipes: Annotated[list[Path], typer.Argument(help="The recipes.")],
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: a Ray cluster.")] = "local",
    workers: Annotated[int, typer.Option(min=1, max=10_000, help="How many recipes are worked on at once.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder that holds each recipe's run, as NAME, and fleet.json.")] = Path(
        "runs"
    ),
    store: Annotated[
        str, typer.Option(metavar="URL", help="Storage that workers share: s3://BUCKET/FOLDER, file:///FOLDER ...")
    ] = "",
    force: Force = False,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Run many recipes at once, and print one table of what became of each.

    A base that several recipes share is loaded once a worker. A task whose worker ends is given to another one, which goes
    on from what is on disk; the same command does too. With --store workers need no disk that all see: each fetches what is
    there of a recipe before a task, and puts it there after it. Exit code 1 if a recipe does not pass, 2 if one could not be
    run.
    """
    from compile_steer.cli.run_tables import print_fleet
    from compile_steer.tools.fleet import run_fleet

    if ":/" in str(out):
        raise typer.BadParameter(f"--out {out} looks like a URL; name that as --store. --out is a folder here.")
    progress = console(as_json=True)
    done = run_fleet(
        recipes,
        out,
        changes or (),
        engine=engine,
        workers=workers,
        force=force,
        store=store,
        report=lambda line: progress.print(f"  {line}", highlight=False, soft_wrap=True),
    )
    errors = [row for row in done.rows if row.state == "error"]
    finish(as_json, done, print_fleet, passed=done.passed or bool(errors))
    if errors:
        raise typer.Exit(2)
