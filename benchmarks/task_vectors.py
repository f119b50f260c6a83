"""Which weights can become a steering vector, and what the task vectors look like, on the embedded model.

    python -m benchmarks.task_vectors

Each arm trains other weights on the same texts for the same number of steps; docs/LOG.md has a run's numbers.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.ocean import committed_program, ocean
from benchmarks.programs import Measure
from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Progress
from compile_steer.lowering import full
from compile_steer.lowering.lowering import Lowering
from compile_steer.lowering.options import FullOptions
from compile_steer.pipeline.run import Run
from compile_steer.tools.task_vector import matrix_reports

SETTINGS = [
    "compile.calibration.prompts=28",
    "compile.calibration.max_new_tokens=40",
    "compile.distill.prompts=12",
]
HELD_OUT = 16
COMMON = FullOptions(optimizer="adamw", batch_tokens=256, epochs=4, cut_rank=8)
QUERY, DOWN = ("self_attn.q_proj",), ("mlp.down_proj",)
WEIGHTS: dict[str, dict[str, Any]] = {
    "W_q, AdamW": {"modules": QUERY},
    "W_down, AdamW": {"modules": DOWN},
    "W_q of block 10, AdamW": {"modules": ("10.self_attn.q_proj",)},
    "W_down of block 10, AdamW": {"modules": ("10.mlp.down_proj",)},
    "all Linears, AdamW": {},
    "all Linears, APOLLO rank 8": {"optimizer": "apollo"},
    "all Linears, APOLLO-Mini": {"optimizer": "apollo", "apollo_rank": 1},
}
RATES = (0.001, 0.003, 0.01)
ARMS = {
    f"{name}, {rate:g}": COMMON.model_copy(update={**changes, "learning_rate": rate})
    for name, changes in WEIGHTS.items()
    for rate in RATES
}


def arm(job: Lowering, measure: Measure, options: FullOptions) -> str:
    """One line of the table: shares left, whole and cut, seconds, and the median stable rank and cosine."""
    one = replace(job, options=job.options.model_copy(update={"full": options}))
    # The texts do not depend on what is trained: written once, by the first job.
    one.__dict__.update(regression_texts=job.regression_texts, training_texts=job.training_texts)
    started = time.perf_counter()
    try:
        patch = full.lower(one)
    except CannotLower as error:
        return str(error)
    seconds = time.perf_counter() - started
    whole = measure.patched(patch)
    small = measure.patched(patch.truncated(options.cut_rank, job.loaded.layout))
    reports = matrix_reports(patch, job.loaded.layout, job.program)
    cosines = {report.name: report.cosine or 0.0 for report in reports}
    best = max(cosines, key=lambda name: cosines[name])
    return (
        f"{whole.mean / measure.base.mean:.1%} | {whole.top1_agreement:.1%} | {small.mean / measure.base.mean:.1%} | "
        f"{seconds:.0f} | {median(report.stable_rank for report in reports):.1f} | "
        f"{median(report.rank_99 for report in reports):.0f} | {median(cosines.values()):.2f} | "
        f"{best.split('layers.')[-1]} {cosines[best]:.2f}"
    )


def table(run: Run, show: Console) -> None:
    """Print the lines of the table as they are measured, a few minutes each."""
    program = committed_program(run)
    job = Lowering(program, run.model, run.data.calibration, run.recipe.compile, run.recipe.seed, run.progress)
    measure = Measure.of(run, program, HELD_OUT)
    tokens = sum(len(text.ids) for text in (*job.regression_texts, *job.training_texts))
    show.print(f"{program.describe()}; {tokens} tokens; KL(steered||base) {measure.base.mean:.3f}", markup=False)
    show.print("| arm | share | top-1 | cut to rank 8 | s | stable rank | 99 % rank | cosine, median | best |")
    for name, options in ARMS.items():
        show.print(f"| {name} | {arm(job, measure, options)} |", markup=False)


def main() -> None:
    """Measure every arm."""
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        table(ocean(SETTINGS, Path(folder), Progress()), console)


if __name__ == "__main__":
    main()
