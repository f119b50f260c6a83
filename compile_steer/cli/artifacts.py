"""The commands on an artifact, which carries its own recipe: what it is, what it changed, and where it is used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compile_steer.artifacts.provenance import EngineName
from compile_steer.artifacts.revision import EMBEDDED
from compile_steer.cli.options import Json, Recipes, RecordedModel, finish, progress_bars, within
from compile_steer.common.detail import Detail, detail

if TYPE_CHECKING:
    from rich.console import Console

Base = Annotated[
    str | None, typer.Option(help="The adapter's base: a hub id in the cache, a folder, a .gguf. [default: as it says]")
]
Anything = Annotated[Path, typer.Argument(help="An adapter of anybody's, a checkpoint, or a program's .safetensors.")]


def show(
    path: Annotated[Path, typer.Argument(help="A program, directions, report, adapter or merged folder.")],
    recipes: Recipes = None,
    as_json: Json = False,
) -> None:
    """Say what an artifact is, what it was made from and how it was verified, and check every link back to its data.

    Exit code 1 if a link was changed: a file that was edited, cut short or swapped.
    """
    from compile_steer.cli.tables import print_lineage, print_summary
    from compile_steer.tools.describe import describe_artifact, summary_of
    from compile_steer.tools.lineage import artifact_root, lineage

    path = artifact_root(path)
    description, links = describe_artifact(path), list(lineage(path, recipes))
    summary = {**description, "lineage": [asdict(link) for link in links]}
    unchanged = all(link.state != "changed" for link in links)

    def show_it(out: Console, _summary: Any) -> None:
        if detail.get() == Detail.VERBOSE:
            out.print(description)
            print_lineage(out, links)
        else:
            print_summary(out, summary_of(description), links)

    finish(as_json, summary, show_it, unchanged)


def reproduce(
    path: Annotated[Path, typer.Argument(help="An adapter, patch, merged folder, vector or directions.")],
    to: Annotated[Path | None, typer.Option(help="Empty folder for what is made. [default: a temporary one]")] = None,
    recipes: Recipes = None,
    model: RecordedModel = None,
    tolerance: Annotated[
        float, typer.Option(callback=within(0, 1), help="Largest relative difference at which numbers agree.")
    ] = 1e-3,
    as_json: Json = False,
) -> None:
    """Make an artifact again from the recipe that it carries, and say link by link whether the same came out.

    Recipe, data and base are checked by their hashes before anything runs. Exit code 0 if all bytes or numbers agree.
    """
    from compile_steer.cli.tables import print_reproduction
    from compile_steer.tools.lineage import artifact_root
    from compile_steer.tools.reproduce import reproduce

    with TemporaryDirectory(prefix="compile-steer-") as temporary:
        # Temporary only where --to names no folder: what was made is then deleted with it.
        reproduction = reproduce(artifact_root(path), to or Path(temporary), recipes, tolerance, progress_bars(), model)
    summary = reproduction.summary()
    finish(as_json, summary, lambda out, _summary: print_reproduction(out, reproduction), reproduction.agrees)


def audit(
    base: Annotated[str, typer.Argument(help="The base: a hub id in the cache, a local folder, a .gguf file.")],
    other: Annotated[str, typer.Argument(help="A fine-tuned or merged model, a plain LoRA adapter, or a patch.")],
    program: Annotated[Path | None, typer.Option(help="A vector's file, to compare baked directions with.")] = None,
    threshold: Annotated[
        float,
        typer.Option(
            callback=within(0, 1), help="Fraction of the largest singular value above which one counts as rank."
        ),
    ] = 0.01,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint or adapter changed against its base: tensors, ranks, types, settings, baked directions.

    Reads the files, tensor by tensor; no model is run.
    """
    from compile_steer.cli.tables import print_audit
    from compile_steer.steering.program import Program
    from compile_steer.tools.audit import audit

    known = None if program is None else Program.load(program)
    changes = audit(base, other, known, threshold, progress_bars())
    finish(as_json, changes, print_audit)


def inspect(
    model: Annotated[str, typer.Argument(help="A hub id in the cache, a local folder, a .gguf file.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Show what is measured on a model: its blocks, points and projections, and what compiles exactly there, by what.

    Loads the model and runs eight tokens through it; nothing is written.
    """
    from compile_steer.cli.tables import print_inspection
    from compile_steer.models.load import load
    from compile_steer.tools.inspect_model import inspect_layout

    finish(as_json, inspect_layout(load(model, dtype=dtype).layout), print_inspection)


def push(
    path: Annotated[Path, typer.Argument(help="An adapter or merged folder.")],
    to: Annotated[str, typer.Option(help="The repository: OWNER/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without this nothing leaves the machine.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public. [default: private]")] = False,
    force: Annotated[bool, typer.Option("--force", help="Send what failed, or was never verified.")] = False,
    recipes: Recipes = None,
    model: RecordedModel = None,
    as_json: Json = False,
) -> None:
    """List what sending an artifact to a hub would do, and with --yes verify it again and do it.

    Exit code 1, and nothing sent, if it was not verified, failed, was changed after it was written, or if measuring it again
    gives other figures than its report.
    """
    from huggingface_hub import HfApi  # slow to import, and of no use to the other commands

    from compile_steer.cli.tables import print_upload
    from compile_steer.tools.lineage import artifact_root
    from compile_steer.tools.push import measured_again, prepare, send

    upload = prepare(artifact_root(path), to, private=not public, recipes=recipes)
    if yes and not upload.refusals:
        upload = measured_again(upload, recipes, progress_bars(), model)
    refused = bool(upload.refusals) and not force
    sent = send(upload, HfApi()) if yes and not refused else None
    summary = {**asdict(upload), "sent": sent}
    finish(as_json, summary, lambda out, _summary: print_upload(out, upload, sent, force), not refused)


def export(
    artifact: Anything,
    engine: Annotated[EngineName, typer.Option("--for", help="The engine that is to load it.")],
    out: Annotated[Path, typer.Option(help="Folder for the files: a new one, or an earlier export.")],
    base: Base = None,
    precision: Annotated[str, typer.Option(help="Of a checkpoint for llama.cpp: f32, f16, q8_0 or q4_0.")] = "f16",
    force: Annotated[bool, typer.Option("--force", help="Export also what failed its verification.")] = False,
    as_json: Json = False,
) -> None:
    """Write what a serving engine loads, in the form that it loads right; or say why it would not, and what to do.

    Adapters become plain LoRA (alpha = rank, scales folded in, a rank that vLLM takes); for llama.cpp a GGUF file of an
    adapter, a checkpoint, or an uncompiled program.
    """
    from compile_steer.cli.tables import print_export
    from compile_steer.tools.serving.export import export

    exported = export(artifact, engine, out, base, precision, force)
    finish(as_json, exported, print_export)


def base(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    model: Annotated[str, typer.Argument(help="A .gguf file, a hub id, a folder, or the embedded model.")] = EMBEDDED,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Of few bits: write it in bfloat16.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as the plain folder that transformers, PEFT and vLLM load, and that its adapters go on.

    Of a GGUF file the weights are de-quantised to float32: exactly those that programs and adapters were made on. With
    --dequantize FP8 and MXFP4 checkpoints become plain ones, which can be steered and compiled; those of compressed-tensors
    and bitsandbytes where that library is installed.
    """
    from compile_steer.cli.tables import print_export
    from compile_steer.tools.serving.export import export_base

    finish(as_json, export_base(model, out, dequantize), print_export)


def verify_engines(
    artifact: Anything,
    engine: Annotated[
        list[str] | None, typer.Option(help="One that 'make engines' installed; by default both. Repeatable.")
    ] = None,
    base: Base = None,
    precision: Annotated[str, typer.Option(help="Of files for llama.cpp: f32, f16, q8_0 or q4_0.")] = "f32",
    limit: Annotated[float, typer.Option(callback=within(1), help="Seconds that an engine may take.")] = 900,
    as_json: Json = False,
) -> None:
    """Export an artifact for serving engines, run them, and compare their log-probabilities with transformers'.

    Exit code 1 if one of them computes something else, or does not run: some load a file without effect. What they
    computed of an adapter or checkpoint of ours is kept beside it, in engines.json, and shown on its card.
    """
    from compile_steer.cli.tables import print_engine_records
    from compile_steer.tools.serving.compare import compare_engines
    from compile_steer.tools.serving.runner import ENGINES, environment

    environments = [environment(name) for name in engine or ENGINES]
    records = compare_engines(artifact, base, environments, precision, limit, progress_bars())
    summary = [{**asdict(record), "passed": record.passed} for record in records]
    passed = all(record.passed for record in records)
    finish(as_json, summary, lambda out, _summary: print_engine_records(out, records), passed)
