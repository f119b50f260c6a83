"""The tools' own libraries against our imports and exports: the same vector, the same logits?

    python -m benchmarks.interop

Needs `repeng` and `steering-vectors`, which ask for older numpy and transformers than this project: in an environment
of their own, `pip install --no-deps repeng steering-vectors 'numpy<2'` beside this project's requirements. Without them
it says what is missing and writes nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Record, machine, table
from compile_steer.common.errors import ArtifactError
from compile_steer.extraction.options import ExtractOptions
from compile_steer.extraction.stage import read_imported
from compile_steer.models.load import LoadedModel, load
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from compile_steer.tools.vector_files import write_gguf

RECORD = Record[None]("INTEROP", "Interop with the tools' own libraries", "python -m benchmarks.interop")
LIBRARIES = {"repeng": "repeng", "steering-vectors": "steering_vectors"}
TEXT = "The quickest way from the harbour to the old town is along the river, past the market and the two bridges."
COEFFICIENT = 1.7


@dataclass(frozen=True)
class Row:
    """A comparison: the largest difference of a logit from the tool's own, over the largest change by steering."""

    what: str
    difference: float
    elsewhere: float | None = None


def logits(one: LoadedModel) -> Tensor:
    """[tokens, vocabulary] of the text."""
    with torch.no_grad():
        found: Tensor = one.model(**one.tokenizer(TEXT, return_tensors="pt")).logits[0]
    return found


def ours(one: LoadedModel, program: Program) -> Tensor:
    """Logits under our hooks."""
    with steered(one.model, program):
        return logits(one)


def imported(one: LoadedModel, path: Path, coefficient: float, **said: Any) -> Program:
    """All vectors of a file at once, at a coefficient, by the way that a recipe takes."""
    options = ExtractOptions.model_validate({"method": "imported", "imported": {"file": path, "joint": "all", **said}})
    point, found = read_imported(options, one.layout, 0)
    directions = Directions(found.vectors, found.shuffled, one.id, one.revision, point, "", joint=True)
    return directions.program(EVERY_BLOCK, coefficient, "all")


def vectors(one: LoadedModel, *blocks: int) -> dict[int, Tensor]:
    """Random vectors an eighth as long as the stream usually is there (about 120 in the middle of SmolLM2-135M)."""
    generator = torch.Generator().manual_seed(1)
    drawn = {k: torch.randn(one.layout.d_model, generator=generator) for k in blocks}
    return {k: 15 * v / v.norm() for k, v in drawn.items()}


def apart(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """The largest difference from `wanted`, over the largest change that made it of `base`."""
    return float((found - wanted).abs().max() / (wanted - base).abs().max())


@contextmanager
def controlled(repeng: Any, one: LoadedModel, control: Any, coefficient: float) -> Iterator[None]:
    """The model under repeng's own control, unwrapped afterwards."""
    wrapped = repeng.ControlModel(one.model, list(control.directions))
    wrapped.set_control(control, coefficient)
    try:
        yield
    finally:
        wrapped.unwrap()


def with_repeng(one: LoadedModel, folder: Path) -> list[Row]:
    """repeng's file in, under both conventions; ours read by repeng."""
    repeng = importlib.import_module("repeng")
    base, drawn = logits(one), vectors(one, 9, 10, 11, 12)
    control = repeng.ControlVector(one.model.config.model_type, {k: v.numpy() for k, v in drawn.items()})
    control.export_gguf(folder / "theirs.gguf")
    with controlled(repeng, one, control, COEFFICIENT):
        wanted = logits(one)
    right, wrong = (
        ours(one, imported(one, folder / "theirs.gguf", COEFFICIENT, layer_convention=convention))
        for convention in ("block", "hidden_state")
    )
    rows = [Row("repeng's GGUF, imported", apart(right, wanted, base), apart(wrong, wanted, base))]

    parts = [Intervention(Site(k), "add", v, COEFFICIENT) for k, v in drawn.items()]
    program = Program(tuple(parts), one.id, one.revision)
    write_gguf(folder / "ours.gguf", program, one.model.config.model_type)
    back = repeng.ControlVector.import_gguf(folder / "ours.gguf")
    exact = all(torch.equal(torch.tensor(back.directions[k]), COEFFICIENT * v) for k, v in drawn.items())
    with controlled(repeng, one, back, 1.0):
        found = logits(one)
    name = f"our GGUF, read by repeng ({'bit for bit' if exact else 'NOT the same numbers'})"
    return [*rows, Row(name, apart(ours(one, program), found, base))]


def with_steering_vectors(one: LoadedModel, folder: Path) -> list[Row]:
    """A saved SteeringVector: refused, converted by the lines of the refusal, imported."""
    library = importlib.import_module("steering_vectors")
    base, drawn = logits(one), vectors(one, 10, 12)
    rows = []
    for kind, point in (("decoder_block", "resid_post"), ("mlp", "mlp_out"), ("self_attn", "attn_out")):
        made = library.SteeringVector(drawn, kind)
        with made.apply(one.model, multiplier=COEFFICIENT):
            wanted = logits(one)
        path = folder / f"{kind}.pt"
        torch.save(made, path)
        found = ours(one, imported(one, convert(one, path, point), COEFFICIENT))
        what = f"steering-vectors' pickle of {kind}: refused, converted as the refusal says, imported"
        rows.append(Row(what, apart(found, wanted, base)))
    return rows


def convert(one: LoadedModel, path: Path, point: str) -> Path:
    """What the lines that the refusal of a pickle says leave, for vectors of that point."""
    try:
        imported(one, path, 1.0, format="caa")
    except ArtifactError as refusal:
        lines = [line.strip() for line in str(refusal).splitlines() if line.startswith("    ")]
    with chdir(path.parent):
        exec("\n".join(lines).replace("resid_post.", f"{point}."), {})
    return path.with_suffix(".safetensors")


def report(rows: Sequence[Row], versions: str) -> list[str]:
    """The page below its head."""
    cells = [
        (row.what, f"{row.difference:.1e}", "" if row.elsewhere is None else f"{row.elsewhere:.2f}") for row in rows
    ]
    return [
        f"{machine()} {versions}. SmolLM2-135M-Instruct, random vectors of length 15 at several blocks at once, coefficient "
        f"{COEFFICIENT}. Difference: the largest of any logit between the model under the tool's own hooks and under ours, "
        "over the largest change that steering makes.",
        "",
        *table(" | difference | with the other layer convention", cells),
    ]


def main() -> int:
    """Compare, write the page and print it; exit code 2 where a library is missing."""
    missing = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}. They are compared with, not needed: see the top of this file.")
        return 2
    model = load("smollm2-135m-instruct", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = with_repeng(model, Path(folder)) + with_steering_vectors(model, Path(folder))
    print(RECORD.save(*report(rows, ", ".join(f"{name} {version(name)}" for name in LIBRARIES))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
