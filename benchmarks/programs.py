"""Every kind of program on real models: what closed form and distillation leave of its divergence.

    python -m benchmarks.programs [--gemma FILE | --mistral] [NAME ...]    # those whose names begin so; others stay as measured

Each program's texts, for calibration and for the measurement, are written by the model under that very
program; the share is over the positions that predict the response, on held-out prompts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.ocean import STANDARD_COMPILE, HeldOut, as_mistral, lowering_of, ocean, stream
from benchmarks.record import Record, above_sections, machine, prose, row, sections, table, timed
from compile_steer.common.progress import ProgressBars
from compile_steer.export.merged import merged_model
from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.logprobs import TokenDivergence
from compile_steer.models.tokens import Encoded
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import Site

# For models that take longer.
LESS = (
    "compile.calibration.max_new_tokens=72",
    "compile.distill.prompts=12",
    "compile.distill.block_steps=600",
)
COEFFICIENT, NEW_TOKENS = 2.5, 40


@dataclass(frozen=True)
class Subject:
    """A model that the programs are compiled on.

    Attributes:
        title: of its table, and of its columns in the first one.
        block: the one that is steered.
        prompts: calibration prompts. most: of the programs that get others. held_out: prompts measured on.
        fitted: share that is to be left by the closed form alone, and after distillation; None: no target.
        exact: the programs that have an exact backend there, and that backend.
        settings: of the recipe.
        prose: heading of its setting in words.
    """

    title: str
    block: int
    prompts: int
    held_out: int
    fitted: dict[str, tuple[float | None, float | None]]
    most: dict[str, int] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = LESS
    prose: str = "programs: setting"


SMOLLM2 = Subject(
    "SmolLM2-135M-Instruct",
    block=10,
    prompts=CompileOptions().calibration.prompts,
    held_out=32,
    fitted={
        "add, all positions, one block": (0.006, 0.002),
        "add, all positions, two vectors at two blocks": (0.015, 0.005),
        "add, response only": (0.05, 0.02),
        "add, last prompt token": (0.06, 0.03),
        "clamp, all positions": (0.05, 0.015),
        "ablate, one site": (0.30, 0.05),
    },
    exact={"ablate, everywhere (untied)": "orthogonalise", "per-layer vectors, all blocks": "bias"},
    settings=STANDARD_COMPILE,
)
# Tied, and with a norm behind every projection: nothing is exact there.
GEMMA = Subject(
    "Gemma 3 270M",
    block=11,
    prompts=36,
    held_out=12,
    most={
        "add, all positions, one block": 60,
        "clamp, all positions": 60,
        "ablate, everywhere (untied)": 60,
    },
    fitted={
        "add, all positions, one block": (0.01, 0.003),
        "add, last prompt token": (0.04, None),
        "add, response only": (0.04, None),
        "clamp, all positions": (0.02, 0.02),
        "ablate, everywhere (untied)": (0.02, None),
        "ablate, one site": (None, None),
        "add, all positions, two vectors at two blocks": (None, None),
        "per-layer vectors, all blocks": (None, None),
    },
    settings=(
        *LESS,
        'prompt_format="User: {prompt}\\nAssistant:\\n"',
        "compile.calibration.max_new_tokens=48",
        "compile.distill.block_steps=300",
    ),
    prose="programs: setting of Gemma",
)
MISTRAL = Subject(
    "SmolLM2 as a Mistral",
    block=10,
    prompts=60,
    held_out=16,
    fitted={"add, all positions, one block": (0.01, 0.003), "add, response only": (0.05, 0.02)},
    prose="programs: setting of Mistral",
)
SUBJECTS = (SMOLLM2, GEMMA, MISTRAL)  # the first has the page's own table, the others a section each
NAMES = (*SMOLLM2.fitted, *SMOLLM2.exact)
# What others train, on the same texts: the objective, from LoRA's own start, and for how many passes over them.
PEERS: dict[str, dict[str, object]] = {
    "forward KL": {"objective": "forward_kl"},
    "likelihood (TRL)": {"objective": "likelihood"},
    "LoRRA": {"objective": "hidden"},
}
BESIDE_PEERS = ("add, all positions, one block", "add, response only")
PEER_SETTINGS = {"start": "random", "learning_rate": 0.02, "batch_tokens": 1024, "epochs": 2.0}
RANK, LORRA_STEPS = 8, 70
PEERS_TITLE = "Beside what others train"
COLUMNS = (
    "program | KL(steered‖base) | calibration prompts | `closed_form`: target | measured | top-1 | s "
    "| then `distill`: target | measured | top-1 | s"
)
RECORD = Record[None]("PROGRAMS", "Every kind of program", "make bench` and `make gemma")


def programs(run: Run, directions: Directions, block: int) -> dict[str, Program]:
    """The programs by name, from the ocean directions of the blocks."""
    vector, later, n_layers = directions.vectors[block], directions.vectors[block + 4], run.model.layout.n_layers
    unit, site = vector / vector.norm(), Site(block)
    # What adding gives the mean token of neutral text.
    projection = float((stream(run, block, 12) @ unit).mean()) + COEFFICIENT * float(vector.norm())
    interventions = {
        "add, all positions, one block": (Intervention(site, "add", vector, COEFFICIENT),),
        "add, all positions, two vectors at two blocks": (
            Intervention(site, "add", vector, 1.5),
            Intervention(Site(block + 4), "add", later, 1.0),
        ),
        "add, response only": (Intervention(site, "add", vector, COEFFICIENT, "response"),),
        "add, last prompt token": (Intervention(site, "add", vector, COEFFICIENT, "last_prompt"),),
        "clamp, all positions": (Intervention(site, "clamp", unit, 1.0, projection=projection),),
        "ablate, one site": (Intervention(site, "ablate", unit),),
        "ablate, everywhere (untied)": ablate_everywhere(unit, n_layers),
        "per-layer vectors, all blocks": tuple(
            Intervention(Site(layer), "add", directions.vectors[layer], 0.15) for layer in range(n_layers)
        ),
    }
    return {name: canonical(Program(parts, run.model.id, run.model.revision)) for name, parts in interventions.items()}


def fitted(run: Run, subject: Subject, name: str, program: Program) -> tuple[str, list[str]]:
    """A program's line in the table of ours, and its lines in the table of everybody's."""
    prompts = subject.most.get(name, subject.prompts)
    calibration = run.recipe.compile.calibration.model_copy(update={"prompts": prompts})
    lowering = lowering_of(run, program, calibration=calibration)
    heldout = HeldOut.of(run, program, subject.held_out, NEW_TOKENS)
    texts = [*lowering.regression_texts, *lowering.training_texts]  # written before any clock starts
    cells: list[object] = [name, f"{heldout.base.mean:.3f}", prompts]
    peers = []

    def peer_line(kind: str, left: TokenDivergence, seconds: float) -> None:
        share = f"{heldout.remaining(left):.2%}"
        peers.append(row(f"{name} | {kind} | {left.mean:.5f} | {share} | {left.top1_agreement:.1%} | {seconds:.0f}"))

    for backend, target in zip(("closed_form", "distill"), subject.fitted[name], strict=True):
        if backend == "distill" and target is None:
            cells += ["-", "not run", "", ""]
            continue
        patch, seconds = timed(partial(BACKENDS[backend].lower, lowering))
        left = heldout.patched(patch)
        cells += [
            "-" if target is None else f"{target:.1%}",
            f"{heldout.remaining(left):.2%}",
            f"{left.top1_agreement:.1%}",
            f"{seconds:.0f}",
        ]
        peer_line(f"`{backend}`", left, seconds)
    if subject is not SMOLLM2 or name not in BESIDE_PEERS:
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
    heldout, backend = HeldOut.of(run, program, SMOLLM2.held_out, NEW_TOKENS), SMOLLM2.exact[name]
    merged = merged_model(run.model.source, BACKENDS[backend].lower(lowering_of(run, program))).eval()
    left = heldout.divergence_of(replace(run.model, model=merged))
    kl = f"{heldout.base.mean:.3f} | - | `{backend}`: KL 1e-6 | {left.mean:.1e}"
    return row(f"{name} | {kl} | {left.top1_agreement:.1%} |  |  |  |  | ")


@dataclass
class Page:
    """What docs/PROGRAMS.md has.

    Attributes:
        settings: by the title of the model, when and on what its programs were measured.
        ours: by title and program, the line of its table.
        peers: by program, its lines in the table of everybody's.
    """

    settings: dict[str, str]
    ours: dict[str, dict[str, str]]
    peers: dict[str, list[str]]

    @staticmethod
    def read() -> Page:
        parts, top = sections(RECORD.path), above_sections(RECORD.path)
        texts = {SMOLLM2.title: top} | {one.title: parts.get(one.title, "") for one in SUBJECTS[1:]}
        settings = {title: text.partition("\n")[0] for title, text in texts.items() if text}
        width = COLUMNS.count("|") + 1
        ours: dict[str, dict[str, str]] = {title: {} for title in texts}
        for title, text in texts.items():
            for name in NAMES:
                for line in (line for line in text.splitlines() if line.startswith(f"| {name} |")):
                    ours[title][name] = (
                        "|".join(line.split("|")[: width + 1]) + "|"
                    )  # without the columns of the others
        beside = parts.get(PEERS_TITLE, "").splitlines()
        return Page(settings, ours, {n: [line for line in beside if line.startswith(f"| {n} |")] for n in NAMES})

    def report(self) -> list[str]:
        """The page below its head, as far as it is measured."""
        own, others = self.ours[SMOLLM2.title], [one.title for one in SUBJECTS[1:]]
        lines = [self.settings.get(SMOLLM2.title, ""), ""]
        lines += table(" | ".join([COLUMNS, *(f"{title}: `closed_form` | then `distill`" for title in others)]), [])
        for name in (name for name in NAMES if name in own):
            cells = [self.ours[title].get(name, "not run|" * 10).split("|") for title in others]
            lines.append(" ".join([own[name], *(f"{cell[5].strip()} | {cell[9].strip()} |" for cell in cells)]))
        lines += ["", f"## {PEERS_TITLE}", "", prose("programs: beside what others train", steps=LORRA_STEPS), ""]
        lines += table("program | what | KL(steered‖compiled) | share | top-1 | s", [])
        lines += [line for name in NAMES for line in self.peers.get(name, [])]
        for title in (title for title in others if self.ours[title]):
            lines += ["", f"## {title}", "", self.settings[title], "", *table(COLUMNS, [])]
            lines += [self.ours[title][name] for name in NAMES if name in self.ours[title]]
        return lines


def main() -> None:
    """Measure every program, or those whose names begin as asked; the page is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", metavar="FILE", help="the GGUF of Gemma 3 270M; without it, the embedded model")
    parser.add_argument("--mistral", action="store_true", help="the embedded model as a checkpoint of another family")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how names of programs begin")
    asked = parser.parse_args()
    subject = GEMMA if asked.gemma else MISTRAL if asked.mistral else SMOLLM2
    console, page = Console(width=160), Page.read()
    sizes: dict[str, object] = {"block": subject.block, "coefficient": COEFFICIENT}
    sizes |= {"held_out": subject.held_out, "new_tokens": NEW_TOKENS}
    sizes["settings"] = ", ".join(f"`{setting}`" for setting in subject.settings)
    page.settings[subject.title] = f"{machine()} {prose(subject.prose, **sizes)}"
    with tempfile.TemporaryDirectory() as folder:
        model = [f"model={asked.gemma}"] if asked.gemma else []
        if subject is MISTRAL:
            as_mistral(Path(folder) / "mistral")
            model = [f"model={folder}/mistral"]
        run = ocean([*subject.settings, *model], Path(folder) / "run", ProgressBars(console))
        all_programs, ours = programs(run, run.extract(), subject.block), page.ours[subject.title]
        for name in (name for name in (*subject.fitted, *subject.exact) if name.startswith(tuple(asked.names) or "")):
            if name in subject.fitted:
                ours[name], peers = fitted(run, subject, name, all_programs[name])
                if subject is SMOLLM2:
                    page.peers[name] = peers
            else:
                ours[name] = exact(run, name, all_programs[name])
            RECORD.save(*page.report())
            console.print(ours[name], markup=False)


if __name__ == "__main__":
    main()
