"""Every kind of program on the embedded model: what closed form and distillation leave of its divergence.

    python -m benchmarks.programs [NAME ...]    # those whose names begin so; the others stay as they were measured

Each program's texts, for calibration and for the measurement, are written by the model under that very
program; the share is over the positions that predict the response, on held-out prompts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ocean import ROOT, machine, ocean, stream
from compile_steer.artifacts.files import save_text
from compile_steer.common.progress import ProgressBars
from compile_steer.export.merged import merged_model
from compile_steer.lowering import distill
from compile_steer.lowering.lowering import Lowering
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import TokenDivergence, divergence, final_states
from compile_steer.models.tokens import Encoded
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
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
PEERS_SAY = (
    "The same texts (both our backends' together), rank 8 everywhere, AdamW: forward KL and the likelihood of the steered "
    "samples (TRL's SFTTrainer) train every Linear from the first intervened block on, for 2 passes; LoRRA's loss (the hidden state "
    f"at the last intervened block) trains query and value of the blocks up to it, for its own {LORRA_STEPS} steps. `distill` includes its "
    "closed form; the writing of the texts is in nobody's seconds."
)
EXACT = {"ablate, everywhere (untied)": "orthogonalise", "per-layer vectors, all blocks": "bias"}
NAMES = (*FITTED, *EXACT)
PAGE, PEERS_TITLE = ROOT / "docs" / "PROGRAMS.md", "## Beside what others train"


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


@dataclass(frozen=True)
class Measure:
    """A program's held-out texts, and the steered model's final states on them."""

    loaded: LoadedModel
    texts: list[Encoded]
    steered: torch.Tensor
    base: TokenDivergence

    @staticmethod
    def of(run: Run, program: Program, count: int = HELD_OUT) -> Measure:
        loaded = run.model
        prompts = run.data.heldout[:count]
        texts = continue_prompts(loaded, prompts, program, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
        wanted, plain = (final_states(loaded, texts, one).response for one in (program, None))
        return Measure(loaded, texts, wanted, divergence(loaded.model, wanted, loaded.model, plain))

    def against(self, other: LoadedModel) -> TokenDivergence:
        """KL(steered || other) on the held-out texts."""
        return divergence(self.loaded.model, self.steered, other.model, final_states(other, self.texts).response)

    def patched(self, patch: WeightPatch) -> TokenDivergence:
        with with_patch(self.loaded.model, patch):
            return self.against(self.loaded)


def _timed(work: Callable[[], WeightPatch]) -> tuple[WeightPatch, float]:
    started = time.perf_counter()
    patch = work()
    return patch, time.perf_counter() - started


def fitted(run: Run, name: str, program: Program) -> tuple[str, list[str]]:
    """A program's line in the table of ours, and its lines in the table of everybody's."""
    prompts = MOST_PROMPTS.get(name, PROMPTS)
    calibration = run.recipe.compile.calibration.model_copy(update={"prompts": prompts})
    options = run.recipe.compile.model_copy(update={"calibration": calibration})
    job = Lowering(program, run.model, run.data.calibration, options, run.recipe.seed, run.progress)
    measure = Measure.of(run, program)
    texts = [*job.regression_texts, *job.training_texts]  # written before any clock starts
    cells, peers = [], []
    for backend, target in zip(("closed_form", "distill"), FITTED[name], strict=True):
        patch, seconds = _timed(partial(BACKENDS[backend].lower, job))
        left = measure.patched(patch)
        share = left.mean / measure.base.mean
        cells.append(f"{target:.1%} | {share:.2%} | {left.top1_agreement:.1%} | {seconds:.0f}")
        peers.append(_line(name, f"`{backend}`", left, measure, seconds))
    for peer, changes in PEERS.items() if name in BESIDE_PEERS else ():
        patch, seconds = _timed(partial(_peer, job, texts, peer, changes))
        peers.append(_line(name, peer, measure.patched(patch), measure, seconds))
    return (
        f"| {name} | {measure.base.mean:.3f} | {prompts} | {' | '.join(cells)} |",
        peers if name in BESIDE_PEERS else [],
    )


def _line(name: str, what: str, left: TokenDivergence, measure: Measure, seconds: float) -> str:
    share = left.mean / measure.base.mean
    return f"| {name} | {what} | {left.mean:.5f} | {share:.2%} | {left.top1_agreement:.1%} | {seconds:.0f} |"


def _peer(job: Lowering, texts: Sequence[Encoded], peer: str, changes: dict[str, object]) -> WeightPatch:
    """Rank-8 edits from LoRA's own start, trained on the texts of both our backends."""
    layout, block = job.loaded.layout, max(one.site.changes_from for one in job.program.interventions)
    settings = job.options.distill.model_copy(update=PEER_SETTINGS | changes)
    start = distill.random_patch(layout, job.program.first_layer, RANK, job.seed)
    if peer == "LoRRA":  # query and value of every block up to the one whose output is matched, for its own 70 steps
        whole = distill.random_patch(layout, 0, RANK, job.seed)
        below = {name for k in range(block + 1) for name in layout.linears(k) if name.endswith(("q_proj", "v_proj"))}
        start = WeightPatch({name: edit for name, edit in whole.low_rank.items() if name in below})
        seen = sum(len(text.ids) for text in texts) * 5 / 6
        settings = settings.model_copy(update={"epochs": LORRA_STEPS * settings.batch_tokens / seen})
    options = job.options.model_copy(update={"distill": settings})
    return distill.train_end_to_end(replace(job, options=options), texts, start, lambda _done: None)


def exact(run: Run, name: str, program: Program) -> str:
    """The line of a program that has an exact backend, merged in memory."""
    job = Lowering(program, run.model, run.data.calibration, run.recipe.compile, run.recipe.seed, run.progress)
    measure = Measure.of(run, program)
    backend = EXACT[name]
    merged = replace(run.model, model=merged_model(run.model.source, BACKENDS[backend].lower(job)).eval())
    left = measure.against(merged)
    return f"| {name} | {measure.base.mean:.3f} | - | `{backend}`: KL 1e-6 | {left.mean:.1e} | {left.top1_agreement:.1%} | | | | | |"


@dataclass(frozen=True)
class Page:
    """The lines of both tables by program: ours, and beside what others train."""

    ours: dict[str, str]
    beside: dict[str, list[str]]

    @staticmethod
    def read() -> Page:
        """What was measured before."""
        text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        first, _, second = text.partition(PEERS_TITLE)
        ours = {name: line for name in NAMES for line in first.splitlines() if line.startswith(f"| {name} |")}
        beside = {name: [line for line in second.splitlines() if line.startswith(f"| {name} |")] for name in NAMES}
        return Page(ours, beside)

    def write(self) -> None:
        """The page, as far as it is measured."""
        settings = ", ".join(f"`{setting}`" for setting in SETTINGS)
        lines = [
            "# Every kind of program",
            "",
            "Written by `make bench`; do not edit.",
            "",
            f"{machine()} SmolLM2-135M-Instruct, `recipes/ocean.yaml` with {settings}. The direction is the mean difference at block "
            f"{BLOCK}, coefficient {COEFFICIENT:g}; calibration texts and held-out continuations ({HELD_OUT} prompts on other topics, "
            f"up to {NEW_TOKENS} tokens, temperature 1) are each program's own. "
            "Numbers are shares of KL(steered‖base) that are left, at the positions that predict the response; the exact programs are "
            "merged in memory and give KL in nats a token. Seconds are a clock's, on a shared machine.",
            "",
            "| program | KL(steered‖base) | calibration prompts | `closed_form`: target | measured | top-1 | s "
            "| then `distill`: target | measured | top-1 | s |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(self.ours[name] for name in NAMES if name in self.ours),
            "",
            PEERS_TITLE,
            "",
            PEERS_SAY,
            "",
            "| program | what | KL(steered‖compiled) | share | top-1 | s |",
            "|---|---|---|---|---|---|",
            *(line for name in NAMES for line in self.beside.get(name, [])),
            "",
        ]
        save_text(PAGE, "\n".join(lines))


def main() -> None:
    """Measure every program, or those whose names begin as asked; the page is written after each."""
    console, page = Console(width=160), Page.read()
    with tempfile.TemporaryDirectory() as folder:
        run = ocean(SETTINGS, Path(folder), ProgressBars(console))
        found = programs(run, run.extract())
        for name in (name for name in NAMES if name.startswith(tuple(sys.argv[1:]) or "")):
            if name in FITTED:
                page.ours[name], page.beside[name] = fitted(run, name, found[name])
            else:
                page.ours[name] = exact(run, name, found[name])
            page.write()
            console.print("\n".join([page.ours[name], *page.beside.get(name, [])]), markup=False)


if __name__ == "__main__":
    main()
