"""The commands on an artifact and a serving engine: what the engine loads of it, and what it then computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import EngineName, Provenance, save_engine_records
from compile_steer.cli.options import Json, person
from compile_steer.cli.tables import print_readings, print_shipped
from compile_steer.common.progress import ProgressBars
from compile_steer.report.card import update_card
from compile_steer.tools.lineage import home
from compile_steer.tools.serving.compare import compare
from compile_steer.tools.serving.environment import ENGINES, environment
from compile_steer.tools.serving.export import ship

Base = Annotated[
    str | None, typer.Option(help="The adapter's base: a hub id in the cache, a folder, a .gguf. [default: as it says]")
]


def export(
    artifact: Annotated[
        Path, typer.Argument(help="An adapter of anybody's, a checkpoint, or a program's .safetensors.")
    ],
    engine: Annotated[EngineName, typer.Option("--for", help="Who is to load it.")],
    out: Annotated[Path, typer.Option(help="Folder for the files: a new one, or an earlier export.")],
    base: Base = None,
    precision: Annotated[str, typer.Option(help="Of a checkpoint for llama.cpp: f32, f16, q8_0 or q4_0.")] = "f16",
    as_json: Json = False,
) -> None:
    """Write what a serving engine loads, in the form that it loads right; or say why it would not, and what to do.

    Adapters become plain LoRA (alpha = rank, scales folded in, a rank that vLLM takes); for llama.cpp a GGUF file of an
    adapter, a checkpoint, or an uncompiled program.
    """
    found = ship(artifact, engine, out, base, precision)
    if as_json:
        print(json.dumps(found.summary(), indent=2))
    else:
        print_shipped(person(as_json), found)


def verify_engines(
    artifact: Annotated[
        Path, typer.Argument(help="An adapter of anybody's, a checkpoint, or a program's .safetensors.")
    ],
    engine: Annotated[
        list[str] | None, typer.Option(help="One that 'make engines' installed; by default both. Repeatable.")
    ] = None,
    base: Base = None,
    precision: Annotated[str, typer.Option(help="Of files for llama.cpp: f32, f16, q8_0 or q4_0.")] = "f32",
    limit: Annotated[float, typer.Option(help="Seconds that an engine may take.")] = 900,
    as_json: Json = False,
) -> None:
    """Export an artifact for serving engines, run them, and hold their log-probabilities against transformers'.

    Exit code 1 if one of them computes something else, or does not run: some load a file without effect. What they computed
    of an adapter or checkpoint of ours is kept beside it, in engines.json, and shown on its card.
    """
    console = person(as_json)
    found = compare(
        artifact, base, [environment(name) for name in engine or ENGINES], precision, limit, ProgressBars(console)
    )
    if save_engine_records(artifact, found):
        update_card(artifact, RunPaths(home(artifact), Provenance.read(artifact).name).validation)
    if as_json:
        print(json.dumps([one.summary() for one in found], indent=2))
    else:
        print_readings(console, found)
    raise typer.Exit(0 if all(one.passed for one in found) else 1)
