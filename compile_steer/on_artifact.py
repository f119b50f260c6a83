"""The commands on an artifact: what it is, whether it can be made again, what it changed, where it is sent.

They need no recipe: an artifact carries its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compile_steer.chain import walk
from compile_steer.describe import describe_artifact
from compile_steer.report import print_chain
from compile_steer.session import Json

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
    found = describe_artifact(path)
    links = walk(path, recipes)
    if as_json:
        print(json.dumps({**found, "chain": [asdict(link) for link in links]}, indent=2))
    else:
        console = Console()
        console.print(found)
        print_chain(console, links)
    raise typer.Exit(1 if any(link.state == "broken" for link in links) else 0)
