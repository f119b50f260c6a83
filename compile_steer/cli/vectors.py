"""The commands beside the walk: a program from another tool's vector, and as one, and back from weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_steer.cli.options import Command, Session
from compile_steer.cli.tables import print_decompiled, print_recombined
from compile_steer.run import load_program
from compile_steer.tools.decompile import run_decompile
from compile_steer.tools.describe import describe_artifact
from compile_steer.tools.recombine import Recombination, recombine
from compile_steer.tools.vector_recipes import Import, new_recipe, run_export, run_import

Convention = Annotated[
    str | None,
    typer.Option(help="What number k in the file is of: block, the output of block k; hidden_state, hidden_states[k]."),
]


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
    found = {"recipe": str(made.path), **describe_artifact(opened.paths.directions)}
    session.finish(found, lambda: session.console.print(told))


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
    found = run_decompile(opened, artifact)
    known = load_program(opened) if opened.paths.program.is_file() else None
    session.finish(found.summary(), lambda: print_decompiled(session.console, found, known))


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
    known = load_program(opened) if opened.paths.program.is_file() else None
    wanted = Recombination(artifact, scale, tuple(add or ()), cut, to)
    found = recombine(wanted, opened.loaded, opened.paths, known)
    session.finish(found.summary(), lambda: print_recombined(session.console, found))
