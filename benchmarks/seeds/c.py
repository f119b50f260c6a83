"""Seed C, 'the steering vector is the prototype, training is production': listening against suggesting.

python -m benchmarks.seeds.c
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.ocean import ocean, opened
from benchmarks.seeds.dial import HEADER, RULE, Dial, signed
from compile_steer.common.progress import Progress, ProgressBars
from compile_steer.models.logprobs import encode_pairs, logprob_margins
from compile_steer.pipeline.artifacts import artifacts, compile_program, merge, verify
from compile_steer.pipeline.run import Run
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.validation.controls import separability
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity

DOSES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS, EVERY = 16, 8, 32, 32, 3
SETTINGS = ["compile.backends=[bias, closed_form]", "verify.forms=[merged-fp32]"]
OCEAN_BLOCK, OCEAN_DOSE = 10, 2.0


def section(progress: Progress) -> list[str]:
    """The Markdown of seed C, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        run = opened("listening", SETTINGS, Path(folder), progress)
        directions = run.extract()
        report = run.validate()
        program = run.program
        compile_program(run, force=True)
        merge(run)
        parities = verify(run, artifacts(run))
        other = ocean([], Path(folder), progress)
        sea = other.extract().program(OCEAN_BLOCK, OCEAN_DOSE, "all")
        return [
            "## C. The vector is the prototype, the weights are the product (listening)",
            "",
            f"`recipes/listening.yaml`: {run.recipe.extract.pairs} matched pairs make the direction, "
            f"{len(run.data.test)} novel scenarios test it.",
            "",
            *_by_block(run, directions),
            *_verdict(report),
            *_dose(run, directions, report),
            *_toggled(run, other, program, sea),
            *_compiled(parities),
        ]


def _by_block(run: Run, directions: Directions) -> list[str]:
    """The difference at each block: its length, and how it tells the test pairs apart."""
    blocks = range(0, run.model.layout.n_layers, EVERY)
    found = [separability(run.context, run.data.test, directions, k, run.recipe.extract.readout) for k in blocks]
    return [
        "| block | " + " | ".join(map(str, blocks)) + " |",
        "|---" * (len(blocks) + 1) + "|",
        "| length of the mean difference | "
        + " | ".join(f"{float(directions.vectors[k].norm()):.1f}" for k in blocks)
        + " |",
        "| AUROC on test pairs | " + " | ".join(f"{one.auroc:.2f}" for one in found) + " |",
        "",
    ]


def _verdict(report: ValidationReport) -> list[str]:
    where = f"block {report.layer}, coefficient {report.coefficient:g}"
    return [f"Validation: **{report.verdict}** ({where}).", "", *(f"- {reason}" for reason in report.reasons), ""]


def _dose(run: Run, directions: Directions, report: ValidationReport) -> list[str]:
    """The strength, up to over-correction."""
    dial = Dial(run, PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS)
    readings = dial.read([directions.program(report.layer, dose, "all") for dose in DOSES])
    rows = [
        f"| {dose:g} | {one.row(run.recipe.seed)} | {one.sample[:70]} |"
        for dose, one in zip(DOSES, readings, strict=True)
    ]
    return [f"| coefficient | {HEADER} | {run.recipe.ask} |", f"|---|{RULE}|---|", *rows, ""]


def _toggled(run: Run, other: Run, listening: Program, sea: Program) -> list[str]:
    """Two vectors at once, each switched and scaled by itself: the effect on the pairs of both behaviours."""
    both = listening + sea
    settings = {
        "listening": both.toggled(1, False),
        "ocean": both.toggled(0, False),
        "both": both,
        "both, ocean at half": both.scaled(0.5, 1),
        "both, listening negated": both.scaled(-1.0, 0),
    }
    lines = ["| switched on | on listening, nats/token | on ocean, nats/token |", "|---|---|---|"]
    pairs = [encode_pairs(one.model, one.data.test[:PAIRS]) for one in (run, other)]
    base = [logprob_margins(run.model, some) for some in pairs]
    for name, program in settings.items():
        cells = [
            signed(bootstrap_mean(logprob_margins(run.model, some, program) - before, seed=run.recipe.seed))
            for some, before in zip(pairs, base, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _compiled(parities: list[Parity]) -> list[str]:
    """The hook removed: what stays."""
    rows = [
        f"| {p.backend} {p.form} | {p.divergence.kl.value:.1e} | {p.divergence.kl_remaining.value:.2%} | "
        f"{p.divergence.top1:.1%} | {p.behaviour.effect_retained or '-'} | {p.behaviour.score_base:.2f} / "
        f"{p.behaviour.score_steered:.2f} / {p.behaviour.score_compiled:.2f} | {p.divergence.hidden_error:.1e} |"
        for p in parities
    ]
    return [
        "The hook removed, the weights reloaded from disk:",
        "",
        "| artifact | KL | remaining KL | top-1 | effect retained | score: base / steered / compiled | error of hidden states |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    console = Console(width=160)
    console.print("\n".join(section(ProgressBars(console))), markup=False)
