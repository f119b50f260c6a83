"""Seed C, 'the steering vector is the prototype, training is production': listening against suggesting."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.ocean import ocean, opened
from benchmarks.record import table
from benchmarks.seeds.readings import HEADER, Reader, signed
from compile_steer.common.progress import Progress
from compile_steer.models.logprobs import encode_pairs, logprob_margins
from compile_steer.pipeline.artifacts import artifacts, compile_program, merge, verify
from compile_steer.pipeline.run import Run
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.validation.controls import separability
from compile_steer.verification.parity import Parity

HEADING = "C. The vector is the prototype, the weights are the product (listening)"
COEFFICIENTS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS, EVERY = 16, 8, 32, 32, 3
SETTINGS = ["compile.backends=[bias, closed_form]", "verify.forms=[merged-fp32]"]
OCEAN_BLOCK, OCEAN_COEFFICIENT = 10, 2.0


def section(progress: Progress) -> list[str]:
    """The Markdown of seed C, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        run = opened("listening", SETTINGS, Path(folder), progress)
        directions, report = run.extract(), run.validate()
        compile_program(run, force=True)
        merge(run)
        parities = verify(run, artifacts(run))
        other = ocean([], Path(folder), progress)
        sea = other.extract().program(OCEAN_BLOCK, OCEAN_COEFFICIENT, "all")
        programs = [directions.program(report.layer, c, "all") for c in COEFFICIENTS]
        readings = Reader(run, PAIRS, NEUTRAL, PROMPTS, NEW_TOKENS).read(programs)
        rows = [(f"{c:g}", *one.cells(run.recipe.seed)) for c, one in zip(COEFFICIENTS, readings, strict=True)]
        return [
            f"`recipes/listening.yaml`: {run.recipe.extract.pairs} matched pairs make the direction, "
            f"{len(run.data.test)} novel scenarios test it.",
            "",
            *by_block(run, directions),
            "",
            f"Validation: **{report.verdict}** (block {report.layer}, coefficient {report.coefficient:g}).",
            "",
            *(f"- {reason}" for reason in report.reasons),
            "",
            *table(f"coefficient | {HEADER} | {run.recipe.ask}", rows),
            "",
            *toggled(run, other, run.program, sea),
            "",
            "The hook removed, the weights reloaded from disk:",
            "",
            *compiled(parities),
        ]


def by_block(run: Run, directions: Directions) -> list[str]:
    """The difference at each block: its length, and how it tells the test pairs apart."""
    blocks = range(0, run.model.layout.n_layers, EVERY)
    found = [separability(run.context, run.data.test, directions, k, run.recipe.extract.readout) for k in blocks]
    rows = [
        ("length of the mean difference", *(f"{float(directions.vectors[k].norm()):.1f}" for k in blocks)),
        ("AUROC on test pairs", *(f"{one.auroc:.2f}" for one in found)),
    ]
    return table(" | ".join(["block", *map(str, blocks)]), rows)


def toggled(run: Run, other: Run, listening: Program, sea: Program) -> list[str]:
    """Two vectors at once, each switched and scaled by itself: the effect on the pairs of both behaviours."""
    both = listening + sea
    settings = {
        "listening": both.toggled(1, False),
        "ocean": both.toggled(0, False),
        "both": both,
        "both, ocean at half": both.scaled(0.5, 1),
        "both, listening negated": both.scaled(-1.0, 0),
    }
    pairs = [encode_pairs(one.model, one.data.test[:PAIRS]) for one in (run, other)]
    base = [logprob_margins(run.model, some) for some in pairs]
    rows = []
    for name, program in settings.items():
        margins = (logprob_margins(run.model, some, program) for some in pairs)
        changes = (after - before for after, before in zip(margins, base, strict=True))
        rows.append((name, *(signed(bootstrap_mean(change, seed=run.recipe.seed)) for change in changes)))
    return table("switched on | on listening, nats/token | on ocean, nats/token", rows)


def compiled(parities: list[Parity]) -> list[str]:
    """The hook removed: what stays."""
    rows = (
        f"{parity.backend} {parity.form} | {(kl := parity.divergence).kl.value:.1e} | {kl.kl_remaining.value:.2%} | {kl.top1:.1%} | "
        f"{(after := parity.behaviour).effect_retained or '-'} | "
        f"{after.score_base:.2f} / {after.score_steered:.2f} / {after.score_compiled:.2f} | {kl.hidden_error:.1e}"
        for parity in parities
    )
    header = "artifact | KL | remaining KL | top-1 | effect retained | score: base / steered / compiled | error of hidden states"
    return table(header, rows)
