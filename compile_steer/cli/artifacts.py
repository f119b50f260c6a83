"""The commands on an artifact: what it is, whether it can be made again, what it changed, where it is sent.

They need no recipe: an artifact carries its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from huggingface_hub import HfApi

from compile_steer.cli.options import Json, person
from compile_steer.cli.tables import print_audit, print_chain, print_reproduction, print_upload
from compile_steer.common.progress import ProgressBars
from compile_steer.steering.program import Program
from compile_steer.tools.audit import THRESHOLD, audit
from compile_steer.tools.describe import describe_artifact
from compile_steer.tools.lineage import walk, whole
from compile_steer.tools.push import prepare, send
from compile_steer.tools.reproduce import TOLERANCE, reproduce

Recipes = Annotated[
    Path | None,
    typer.Option(
        help="Folder that the recorded recipe's data paths are relative to. "
        "[default: the nearest one at or above the artifact, or its recipes/, that has them]"
    ),
]


def show(
    path: Annotated[Path, typer.Argument(help="A program, directions, report, adapter or merged folder.")],
    recipes: Recipes = None,
    as_json: Json = False,
) -> None:
    """Say what an artifact is, what it was made from and how it was judged, and check every link back to its data.

    Exit code 1 if a link is broken: a file that was edited, cut short or swapped.
    """
    path = whole(path)
    found = describe_artifact(path)
    links = walk(path, recipes)
    if as_json:
        print(json.dumps({**found, "chain": [asdict(link) for link in links]}, indent=2))
    else:
        console = person(as_json)
        console.print(found)
        print_chain(console, links)
    raise typer.Exit(1 if any(link.state == "broken" for link in links) else 0)


def reproduce_(
    path: Annotated[Path, typer.Argument(help="An adapter, patch, merged folder, vector or directions.")],
    to: Annotated[Path | None, typer.Option(help="Empty folder for what is made. [default: a temporary one]")] = None,
    recipes: Recipes = None,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference by which numbers agree.")] = TOLERANCE,
    as_json: Json = False,
) -> None:
    """Make an artifact again from the recipe that it carries, and say link by link whether the same came out.

    Recipe, data and base are checked by their hashes before anything runs. Exit code 0 if all bytes or numbers agree.
    """
    console = person(as_json)
    with TemporaryDirectory(prefix="compile-steer-") as temporary:
        found = reproduce(whole(path), to or Path(temporary), recipes, tolerance, ProgressBars(console))
    if as_json:
        print(json.dumps(found.summary(), indent=2))
    else:
        print_reproduction(console, found)
    raise typer.Exit(0 if found.agrees else 1)


def audit_(
    base: Annotated[str, typer.Argument(help="The base: a hub id in the cache, a local folder, a .gguf file.")],
    other: Annotated[str, typer.Argument(help="A fine-tuned or merged model, a plain LoRA adapter, or a patch.")],
    program: Annotated[Path | None, typer.Option(help="A vector's file, to hold baked directions against.")] = None,
    threshold: Annotated[
        float, typer.Option(help="Share of the largest singular value above which one counts as rank.")
    ] = THRESHOLD,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint or adapter changed against its base: tensors, ranks, types, settings, baked directions.

    Read off the files, tensor by tensor; no model is run.
    """
    console = person(as_json)
    known = None if program is None else Program.load(program)
    found = audit(base, other, known, threshold, ProgressBars(console))
    if as_json:
        print(json.dumps(found.summary(), indent=2))
    else:
        print_audit(console, found)


def push(
    path: Annotated[Path, typer.Argument(help="An adapter or merged folder.")],
    to: Annotated[str, typer.Option(help="The repository: OWNER/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this nothing leaves the machine.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is for all to see. [default: private]")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Send what failed, or was never verified.")] = False,
    as_json: Json = False,
) -> None:
    """List what sending an artifact to a hub would do, and with --yes do it.

    Exit code 1, and nothing sent, if it was not verified, failed, or was changed after it was written.
    """
    console = person(as_json)
    upload = prepare(whole(path), to, private=not public)
    refused = bool(upload.refusals) and not force
    sent = send(upload, HfApi()) if yes and not refused else None
    if as_json:
        print(json.dumps({**upload.summary(), "sent": sent}, indent=2))
    else:
        print_upload(console, upload, sent, force)
    raise typer.Exit(1 if refused else 0)
