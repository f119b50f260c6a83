"""The commands that talk to base, steered and compiled model: in the terminal, and on a local page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_steer.cli.options import Device, Dtype, Json, RecordedModel, console, finish, within
from compile_steer.common.errors import RecipeError

RunOrArtifact = Annotated[Path, typer.Argument(help="A run's folder (runs/NAME), or that of an artifact.")]
Chosen = Annotated[
    Path | None, typer.Option("--artifact", help="Of a run: another than the one to ship, by name or path.")
]
ItsProgram = Annotated[
    Path | None, typer.Option("--program", help="The vector's file. [default: where the run left it]")
]
Longest = Annotated[int, typer.Option(callback=within(1, 1e5), help="The longest answer, in tokens.")]
Strength = Annotated[
    float, typer.Option(callback=within(-1e6), help="Factor on the steering; adapters follow it, merged models do not.")
]
_LOADING = "Loading the base and what was compiled for it"


def chat(
    path: RunOrArtifact,
    artifact: Chosen = None,
    ask: Annotated[str | None, typer.Option(help="Answer this one prompt, compare, and end.")] = None,
    sides: Annotated[str, typer.Option("--show", help="Which models answer.")] = "base,steered,compiled",
    strength: Strength = 1.0,
    max_new_tokens: Longest = 40,
    program: ItsProgram = None,
    model: RecordedModel = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Talk to the base, the steered and the compiled model, side by side; /help lists what can be turned meanwhile.

    With --ask: three answers, and how far the compiled model is from the steered one on each token of that answer. Exit code
    1 if that misses the gate that the artifact was verified by.
    """
    from compile_steer.tools.chat import Chat, parse_sides
    from compile_steer.tools.side_by_side import Member, SideBySide, choose_artifact

    if ask is None and as_json:
        raise RecipeError("--json prints one result: give the prompt with --ask.")
    shown = parse_sides(sides)
    member = Member.read(choose_artifact(path, artifact), program)
    with console(as_json=True).status(_LOADING):
        models = SideBySide.open([member], model=model, device=device, dtype=dtype)
    talk = Chat(models, console(as_json), shown, strength, max_new_tokens)
    if ask is None:
        talk.loop()
        return
    turn = talk.ask(ask)
    finish(as_json, turn.summary(), passed=turn.divergence is None or turn.divergence.passed)


def play(
    paths: Annotated[list[Path], typer.Argument(help="Folders of runs, or of adapters: several programs on one base.")],
    artifact: Chosen = None,
    port: Annotated[
        int | None, typer.Option(callback=within(1, 65535), help="Of 127.0.0.1. [default: the first free from 7860]")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    max_new_tokens: Longest = 40,
    program: ItsProgram = None,
    model: RecordedModel = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Open a page on which base, steered and compiled model answer beside each other, every token coloured by its KL.

    Only this machine can reach it, and it asks nothing of any other. Ctrl-C ends it.
    """
    from compile_steer.tools.playground import Playground, require_free, require_gradio, serve, wait
    from compile_steer.tools.side_by_side import Member, SideBySide, choose_artifact

    several = len(paths) > 1
    if several and (artifact or program):
        raise RecipeError("--artifact and --program are for one run; name the artifacts' folders in the runs' place.")
    folders = [choose_artifact(path, artifact, adapter=several) for path in paths]
    members = [Member.read(folder, program) for folder in folders]
    require_gradio()
    port = require_free(port)  # before the seconds that the model takes
    with console(as_json=True).status(_LOADING):
        models = SideBySide.open(members, model=model, device=device, dtype=dtype)
    with serve(Playground(models, max_new_tokens), port, browser) as address:
        console().print(f"{address} (Ctrl-C ends it)")
        wait()
