"""Every kind of program on the embedded model: what closed form and distillation leave of its divergence.

    python -m benchmarks.programs [NAME ...]    # those whose names begin so; the others stay as they were measured

Each program's texts, for calibration and for the measurement, are written by the model under that very
program; the share is over the positions that predict the response, on held-out prompts.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.ocean import HeldOut, lowering_of, ocean, stream
from benchmarks.record import Record, machine, prose, row, table, timed
from compile_steer.common.progress import ProgressBars
from compile_steer.export.merged import merged_model
from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.logprobs import TokenDivergence
from compile_steer.models.tokens import Encoded
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import Site

SETTINGS = [
    "compile.calibration.max_new_tokens=72",
    "compile.distill.prompts=12",
    "compile.distill.block_steps=600",
]
BLOCK, COEFFICIENT, HELD_OUT, NEW_TOKENS = 10, 2.5, 32, 40
# Calibration prompts: where the aim is tightest what is left is the fit's own sampling noise, so more of them.
PROMPTS, MOST_PROMPTS = 120, {"add, all positions, one block": 200}
# Targets of issue and design: share left by the closed form alone, and after distillation.
FITTED = {
    "add, all positions, one block": (0.006, 0.002),
    "add, all positions, two vectors at two blocks": (0.015, 0.005),
    "add, response only": (0.05, 0.02),
    "add, last prompt token": (0.06, 0.03),
    "clamp, all positions": (0.05, 0.015),
    "ablate, one site": (0.30, 0.05),
}
# What others train, on the same texts: the objective, from LoRA's own start, and for how many passes over them.
PEERS: dict[str, dict[str, object]] = {
    "forward KL": {"objective": "forward_kl"},
    "likelihood (TRL)": {"objective": "likelihood"},
    "LoRRA": {"objective": "hidden"},
}
BESIDE_PEERS = ("add, all positions, one block", "add, response only")
PEER_SETTINGS = {"start": "random", "learning_rate": 0.02, "batch_tokens": 1024, "epochs": 2.0}
RANK, LORRA_STEPS = 8, 70
EXACT = {"ablate, everywhere (untied)": "orthogonalise", "per-layer vectors, all blocks": "bias"}
NAMES = (*FITTED, *EXACT)
PEERS_TITLE = "Beside what others train"
RECORD = Record[None]("PROGRAMS", "Every kind of program", "make bench")


def programs(run: Run, directions: Directions) -> dict[str, Program]:
    """The programs by name, from the ocean directions of the blocks."""
    vector, later, n_layers = directions.vectors[BLOCK], directions.vectors[BLOCK + 4], run.model.layout.n_layers
    unit, site = vector / vector.norm(), Site(BLOCK)
    # What adding gives the mean token of neutral text.
    projection = float((stream(run, BLOCK, 12) @ unit).mean()) + COEFFICIENT * float(vector.norm())
    interventions = {
        "add, all positions, one block": (Intervention(site, "add", vector, COEFFICIENT),),
        "add, all positions, two vectors at two blocks": (
            Intervention(site, "add", vector, 1.5),
            Intervention(Site(BLOCK + 4), "add", later, 1.0),
        ),
        "add, response only": (Intervention(site, "add", vector, COEFFICIENT, "response"),),
        "add, last prompt token": (Intervention(site, "add", vector, COEFFICIENT, "last_prompt"),),
        "clamp, all positions": (Intervention(site, "clamp", unit, 1.0, projection=projection),),
        "ablate, one site": (Intervention(site, "ablate", unit),),
        "ablate, everywhere (untied)": ablate_everywhere(unit, n_layers),
        "per-layer vectors, all blocks": tuple(
            Intervention(Site(block), "add", directions.vectors[block], 0.15) for block in range(n_layers)
        ),
    }
    return {name: canonical(Program(parts, run.model.id, run.model.revision)) for name, parts in interventions.items()}


def fitted(run: Run, name: str, program: Program) -> tuple[str, list[str]]:
    """A program's line in the table of ours, and its lines in the table of everybody's."""
    prompts = MOST_PROMPTS.get(name, PROMPTS)
    calibration = run.recipe.compile.calibration.model_copy(update={"prompts": prompts})
    lowering = lowering_of(run, program, calibration=calibration)
    heldout = HeldOut.of(run, program, HELD_OUT, NEW_TOKENS)
    texts = [*lowering.regression_texts, *lowering.training_texts]  # written before any clock starts
    cells: list[object] = [name, f"{heldout.base.mean:.3f}", prompts]
    peers = []

    def peer_line(kind: str, left: TokenDivergence, seconds: float) -> None:
        share = f"{heldout.remaining(left):.2%}"
        peers.append(row(f"{name} | {kind} | {left.mean:.5f} | {share} | {left.top1_agreement:.1%} | {seconds:.0f}"))

    for backend, target in zip(("closed_form", "distill"), FITTED[name], strict=True):
        patch, seconds = timed(partial(BACKENDS[backend].lower, lowering))
        left = heldout.patched(patch)
        cells += [f"{target:.1%}", f"{heldout.remaining(left):.2%}", f"{left.top1_agreement:.1%}", f"{seconds:.0f}"]
        peer_line(f"`{backend}`", left, seconds)
    if name not in BESIDE_PEERS:
        return row(cells), []
    for peer, changes in PEERS.items():
        patch, seconds = timed(partial(train_peer, lowering, texts, peer, changes))
        peer_line(peer, heldout.patched(patch), seconds)
    return row(cells), peers


def train_peer(lowering: Lowering, texts: Sequence[Encoded], peer: str, changes: dict[str, object]) -> WeightPatch:
    """Rank-8 edits from LoRA's own start, trained on the texts of both our backends."""
    layout, block = lowering.loaded.layout, max(one.site.changes_from for one in lowering.program.interventions)
    settings = lowering.options.distill.model_copy(update=PEER_SETTINGS | changes)
    start = distill.random_patch(layout, lowering.program.first_layer, RANK, lowering.seed)
    if peer == "LoRRA":  # query and value of every block up to the one whose output is matched, for its own 70 steps
        whole = distill.random_patch(layout, 0, RANK, lowering.seed)
        below = {name for k in range(block + 1) for name in layout.linears(k) if name.endswith(("q_proj", "v_proj"))}
        start = WeightPatch({name: edit for name, edit in whole.low_rank.items() if name in below})
        seen = sum(len(text.ids) for text in texts) * 5 / 6
        settings = settings.model_copy(update={"epochs": LORRA_STEPS * settings.batch_tokens / seen})
    options = lowering.options.model_copy(update={"distill": settings})
    return distill.train_end_to_end(replace(lowering, options=options), texts, start, lambda _done: None)


def exact(run: Run, name: str, program: Program) -> str:
    """The line of a program that has an exact backend, merged in memory."""
    heldout, backend = HeldOut.of(run, program, HELD_OUT, NEW_TOKENS), EXACT[name]
    merged = merged_model(run.model.source, BACKENDS[backend].lower(lowering_of(run, program))).eval()
    left = heldout.divergence_of(replace(run.model, model=merged))
    kl = f"{heldout.base.mean:.3f} | - | `{backend}`: KL 1e-6 | {left.mean:.1e}"
    return row(f"{name} | {kl} | {left.top1_agreement:.1%} |  |  |  |  | ")


def measured_before() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The lines of both tables by program, as the page has them."""
    text = RECORD.path.read_text(encoding="utf-8") if RECORD.path.is_file() else ""
    ours, _, peers = text.partition(PEERS_TITLE)
    lines = {name: [line for line in ours.splitlines() if line.startswith(f"| {name} |")] for name in NAMES}
    beside = {name: [line for line in peers.splitlines() if line.startswith(f"| {name} |")] for name in NAMES}
    return {name: found[0] for name, found in lines.items() if found}, beside


def report(ours: dict[str, str], beside: dict[str, list[str]]) -> list[str]:
    """The page below its head, as far as it is measured."""
    settings = ", ".join(f"`{setting}`" for setting in SETTINGS)
    sizes = {"block": BLOCK, "coefficient": COEFFICIENT, "held_out": HELD_OUT, "new_tokens": NEW_TOKENS}
    setting = prose("programs: setting", settings=settings, **sizes)
    return [
        f"{machine()} {setting}",
        "",
        *table(
            "program | KL(steered‖base) | calibration prompts | `closed_form`: target | measured | top-1 | s "
            "| then `distill`: target | measured | top-1 | s",
            [],
        ),
        *(ours[name] for name in NAMES if name in ours),
        "",
        f"## {PEERS_TITLE}",
        "",
        prose("programs: beside what others train", steps=LORRA_STEPS),
        "",
        *table("program | what | KL(steered‖compiled) | share | top-1 | s", []),
        *(line for name in NAMES for line in beside.get(name, [])),
    ]


def main() -> None:
    """Measure every program, or those whose names begin as asked; the page is written after each."""
    console, (ours, beside) = Console(width=160), measured_before()
    with tempfile.TemporaryDirectory() as folder:
        run = ocean(SETTINGS, Path(folder), ProgressBars(console))
        all_programs = programs(run, run.extract())
        for name in (name for name in NAMES if name.startswith(tuple(sys.argv[1:]) or "")):
            if name in FITTED:
                ours[name], beside[name] = fitted(run, name, all_programs[name])
            else:
                ours[name] = exact(run, name, all_programs[name])
            RECORD.save(*report(ours, beside))
            console.print("\n".join([ours[name], *beside.get(name, [])]), markup=False)


if __name__ == "__main__":
    main()
