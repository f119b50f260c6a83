"""Tamperings with what a small run leaves, each with the command that must notice it and the words that it must say.

Generated: every file of every kind of artifact, times what can be done to it. `tests/unit/test_tampering.py` and the
campaign behind docs/RELIABILITY.md go through the same table. Hidden files are left out: nothing loads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.tampering_changes import (
    Change,
    beside,
    copied,
    cut,
    edit,
    empty,
    exchanged,
    figure_in_card,
    figures,
    flip,
    forged_report,
    header,
    link_beside,
    rename,
    row,
    scale,
    without,
)
from compile_steer.artifacts.provenance import PARITY
from compile_steer.cli.app import app
from compile_steer.common.errors import CompileSteerError
from tests.helpers.small_run import SmallRun

NAME = "tide"
ADAPTER, PATCH = f"adapters/{NAME}-closed_form", f"adapters/{NAME}-bias"
MERGED, SUMMED = f"merged/{NAME}-bias-fp32", f"merged/{NAME}-closed_form-fp32"
VECTOR, VALIDATION = f"vectors/{NAME}.safetensors", f"vectors/{NAME}.validation.json"
DIRECTIONS, ROWS = f"vectors/{NAME}.directions.safetensors", f"vectors/{NAME}.prompts.jsonl"
WEIGHTS = {ADAPTER: "adapter_model.safetensors", PATCH: "patch.safetensors", MERGED: "model.safetensors"}


@dataclass(frozen=True)
class Tampering:
    """`change` is done to `file` below the run's folder; then `command` on `artifact` must exit with `code` and say `words`.

    `words` is a pattern; code 0 stands for a remark that is said although nothing failed.
    """

    name: str
    file: str
    change: Change
    command: str
    artifact: str
    words: str
    codes: tuple[int, ...] = (1, 2)

    def __str__(self) -> str:
        return f"{self.command} {self.artifact}: {self.name} {self.file}"


# --------------------------------------------------------------------------------------------- the table


def _weights() -> Iterator[Tampering]:
    """The weights of adapter, patch and checkpoint, and the commands that read them."""
    changes: dict[str, tuple[Change, str]] = {
        "bit flipped in": (flip, "was changed|changed"),
        "scaled": (scale, "was changed|changed"),
        "cut short": (cut, "was changed|changed|damaged"),
        "emptied": (empty, "was changed|changed|damaged"),
        "renamed": (rename, "is missing|changed"),
        "header of": (header, "was changed|changed"),
    }
    for folder, file in WEIGHTS.items():
        for name, (change, words) in changes.items():
            yield Tampering(name, f"{folder}/{file}", change, "show", folder, words, (1,))
        for command in ("verify", "push", "export") if folder == MERGED else ("merge", "reproduce"):
            words = "was changed|not what was written"
            yield Tampering("scaled", f"{folder}/{file}", scale, command, folder, words)


def _extra_files() -> Iterator[Tampering]:
    extra = {
        ADAPTER: ("adapter_model.bin", "adapter_model-2.safetensors", "additional_config.json", "inner/README.md"),
        MERGED: ("pytorch_model.bin", "model-2.safetensors", "model.safetensors.index.json", "chat_template.json"),
    }
    for folder, names in extra.items():
        for name in names:

            def put(path: Path, name: str = name) -> None:
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(b"{}")

            for command in ("show", "verify"):
                yield Tampering(f"{name} beside", folder, put, command, folder, re.escape(name))
    yield Tampering("linked folder in", MERGED, link_beside, "verify", MERGED, "additional_chat_templates is not among")
    yield Tampering(
        "pytorch_model.bin beside", MERGED, beside("pytorch_model.bin"), "push", MERGED, "pytorch_model.bin"
    )
    yield Tampering(
        "adapter_model.bin beside", ADAPTER, beside("adapter_model.bin"), "merge", ADAPTER, "adapter_model.bin"
    )


def _settings() -> Iterator[Tampering]:
    for folder, file in ((ADAPTER, "adapter_config.json"), (MERGED, "config.json"), (MERGED, "tokenizer.json")):
        yield Tampering(
            "edited", f"{folder}/{file}", edit(lora_alpha=1, rope_theta=7.0), "verify", folder, f"{file} was changed"
        )
        yield Tampering("renamed", f"{folder}/{file}", rename, "show", folder, "no such file|nothing|missing", (1,))


def _records() -> Iterator[Tampering]:
    """compile_steer.json: edited by hand, keys deleted, sealed again with another figure."""
    for folder in (ADAPTER, PATCH, MERGED):
        file = f"{folder}/compile_steer.json"
        yield Tampering("seed edited in", file, edit(seed=77), "show", folder, "Changed: record", (1,))
        yield Tampering("hash deleted from", file, without("record_sha256"), "show", folder, "Changed: record", (1,))
        yield Tampering(
            "verdict sealed again in", file, figures(verdict="pass"), "show", folder, "validation's verdict", (1,)
        )
        command = "verify" if folder == MERGED else "merge"
        yield Tampering("seed edited in", file, edit(seed=77), command, folder, "was edited")
        yield Tampering("key deleted from", file, without("backend"), command, folder, "damaged|backend")
    yield Tampering(
        "seed edited in", f"{ADAPTER}/compile_steer.json", edit(seed=77), "reproduce", ADAPTER, "record +differs"
    )
    yield Tampering(
        "hash deleted from", f"{MERGED}/compile_steer.json", without("record_sha256"), "verify", MERGED, "lost its hash"
    )
    file = f"{MERGED}/compile_steer.json"
    yield Tampering(
        "hashes of files taken from", file, figures(files_sha256={}), "verify", MERGED, "not checked:.* files", (0, 1)
    )
    yield Tampering(
        "hashes of files taken from", file, figures(files_sha256={}), "push", MERGED, "cannot be checked", (0, 1)
    )
    yield Tampering(
        "fingerprint taken from", file, figures(fingerprint=[]), "verify", MERGED, "not checked:.* on disk", (0, 1)
    )
    yield Tampering(
        "program of", file, figures(program_sha256="0" * 64), "verify", MERGED, "compiled from another program"
    )
    yield Tampering("base of", file, figures(revision="sha256:0"), "verify", MERGED, "was compiled for")
    file = f"{PATCH}/compile_steer.json"
    yield Tampering("seed sealed again in", file, figures(seed=77), "show", MERGED, "adapter +changed", (1,))


def _reports() -> Iterator[Tampering]:
    file = f"{ADAPTER}/{PARITY}"
    yield Tampering("verdict edited in", file, edit(passed=True, reasons=[]), "show", ADAPTER, "parity's record", (1,))
    yield Tampering("verdict edited in", file, edit(passed=True, reasons=[]), "push", ADAPTER, "was edited")
    yield Tampering(
        "verdict sealed again in", file, figures(passed=True, reasons=[]), "show", ADAPTER, "parity's verdict", (1,)
    )
    yield Tampering(
        "verdict sealed again in", file, figures(passed=True, reasons=[]), "push", ADAPTER, "parity's verdict"
    )
    yield Tampering("hash deleted from", file, without("record_sha256"), "push", ADAPTER, "was edited")
    yield Tampering("key deleted from", file, without("divergence"), "show", ADAPTER, "complete report", (1,))
    yield Tampering("emptied", file, empty, "show", ADAPTER, "damaged")
    yield Tampering("deleted", file, Path.unlink, "show", ADAPTER, "missing:.* parity", (1,))
    file = f"{MERGED}/{PARITY}"
    yield Tampering("deleted", file, Path.unlink, "push", MERGED, "is missing")
    yield Tampering(
        "another artifact's", file, copied(f"{ADAPTER}/{PARITY}"), "show", MERGED, "parity is of these weights", (1,)
    )
    yield Tampering("another artifact's", file, copied(f"{ADAPTER}/{PARITY}"), "push", MERGED, "of other weights")
    yield Tampering("program in", file, figures(sha256__program="0" * 64), "show", MERGED, "parity's program", (1,))
    yield Tampering("base in", file, figures(sha256__base="sha256:0"), "push", MERGED, "of other weights|parity's base")
    yield Tampering("form in", file, figures(form="merged-bf16"), "show", MERGED, "parity's form", (1,))
    yield Tampering("unchecked made passed in", file, figures(checks=[]), "show", MERGED, "parity's verdict", (1,))
    yield Tampering(
        "figure sealed again in", file, forged_report, "push --yes", MERGED, "measured again, divergence.kl_base"
    )
    for folder in (ADAPTER, MERGED):
        yield Tampering("figures in", f"{folder}/README.md", figure_in_card, "show", folder, "Changed: card", (1,))
    yield Tampering("figures in", f"{MERGED}/README.md", figure_in_card, "push", MERGED, "card: ")
    yield Tampering(
        "another artifact's",
        f"{MERGED}/README.md",
        copied(f"{SUMMED}/README.md"),
        "show",
        MERGED,
        "Changed: card",
        (1,),
    )
    yield Tampering("deleted", f"{MERGED}/README.md", Path.unlink, "show", MERGED, "missing:.* card", (0,))


def _lineage() -> Iterator[Tampering]:
    """What an artifact was made from: vector, directions, validation, results, data, another adapter in its place."""
    for artifact in (ADAPTER, MERGED):
        yield Tampering("scaled", VECTOR, scale, "show", artifact, "vector +changed", (1,))
        yield Tampering("edited", VALIDATION, edit(verdict="pass"), "show", artifact, "validation +changed", (1,))
        yield Tampering("rows of", ROWS, row, "show", artifact, "results by prompt +changed", (1,))
        yield Tampering("scaled", DIRECTIONS, scale, "show", artifact, "directions +changed", (1,))
        yield Tampering(
            "row of", "../../recipes/data/heldout.jsonl", row, "show", artifact, "data heldout +changed", (1,)
        )
    yield Tampering("scaled", VECTOR, scale, "verify", MERGED, "compiled from another program")
    yield Tampering("header of", VECTOR, header, "verify", MERGED, "compiled from another program")
    yield Tampering("scaled", VECTOR, scale, "merge all", ADAPTER, "compiled from another program")
    yield Tampering(
        "row of", "../../recipes/data/heldout.jsonl", row, "verify", MERGED, "heldout changed since", (0, 1)
    )
    yield Tampering("row of", "../../recipes/data/train.jsonl", row, "push", MERGED, "data train")
    yield Tampering("row of", "../../recipes/data/train.jsonl", row, "reproduce", ADAPTER, "data train +differs")
    yield Tampering("scaled", DIRECTIONS, scale, "show", DIRECTIONS, "was changed after it was written")
    yield Tampering("verdict edited in", VALIDATION, edit(verdict="pass"), "show", VALIDATION, "Changed: record", (1,))
    yield Tampering(
        "verdict sealed again in", VALIDATION, figures(verdict="pass"), "show", VALIDATION, "by its figures", (1,)
    )
    yield Tampering("deleted", VALIDATION, Path.unlink, "show", VECTOR, "missing:.* validation is of this vector", (0,))
    yield Tampering("exchanged", ADAPTER, exchanged(f"{NAME}-bias"), "merge all", ADAPTER, "holds what .* compiled")
    yield Tampering("exchanged", ADAPTER, exchanged(f"{NAME}-bias"), "show", SUMMED, "adapter +changed", (1,))
    yield Tampering("exchanged", MERGED, exchanged(f"{NAME}-closed_form-fp32"), "show", MERGED, "place +changed", (1,))


TAMPERINGS: tuple[Tampering, ...] = (
    *_weights(),
    *_extra_files(),
    *_settings(),
    *_records(),
    *_reports(),
    *_lineage(),
)


def unnoticed(tampering: Tampering, root: Path) -> str:
    """Spoil the small run at `root` (recipes/ and runs/tide/), run the command, and return what went wrong; '' if it noticed."""
    out, recipe = root / "runs" / NAME, root / "recipes" / f"{NAME}.yaml"
    tampering.change(out / tampering.file)
    artifact = str(out / tampering.artifact)
    command, *flags = tampering.command.split()
    arguments = {
        "merge": [str(recipe), "--out", str(out), *([] if flags else ["--artifact", artifact])],
        "verify": [str(recipe), "--out", str(out), "--artifact", artifact],
        "push": [artifact, "--to", "somebody/tide", "--model", SmallRun(root).read().model, *flags],
        "reproduce": [artifact, "--model", SmallRun(root).read().model],
        "export": [artifact, "--for", "transformers", "--out", str(root / "exported")],
    }.get(command, [artifact])
    result = CliRunner().invoke(app, [command, *arguments])
    if isinstance(result.exception, CompileSteerError):  # the command line prints it, and exits with 2
        code, said = 2, str(result.exception)
    else:
        code, said = result.exit_code, result.output
    if result.exception is not None and not isinstance(result.exception, CompileSteerError | SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    said = " ".join(said.split())
    if code not in tampering.codes:
        return f"exit code {code}, needed {tampering.codes}: {said[-600:]}"
    return "" if re.search(tampering.words, said) else f"'{tampering.words}' is not said: {said[-900:]}"
