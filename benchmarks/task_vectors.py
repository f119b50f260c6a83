"""Which weights can become a steering vector, and what the task vectors look like, on the embedded model.

    python -m benchmarks.task_vectors

Each condition trains other weights on the same texts for the same number of steps; docs/LOG.md has a run's numbers.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.ocean import HeldOut, committed_program, lowering_of, ocean
from benchmarks.record import row, table, timed
from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Progress
from compile_steer.lowering import full
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import FullOptions
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
CONDITIONS = {
    f"{name}, {rate:g}": COMMON.model_copy(update={**changes, "learning_rate": rate})
    for name, changes in WEIGHTS.items()
    for rate in RATES
}


def condition(lowering: Lowering, heldout: HeldOut, options: FullOptions) -> list[str]:
    """One line of the table: shares left, whole and cut, seconds, and the median stable rank and cosine."""
    changed = replace(lowering, options=lowering.options.model_copy(update={"full": options}))
    # The texts do not depend on what is trained: written once, by the first condition.
    changed.__dict__.update(regression_texts=lowering.regression_texts, training_texts=lowering.training_texts)
    try:
        patch, seconds = timed(lambda: full.lower(changed))
    except CannotLower as error:
        return [str(error)]
    layout = lowering.loaded.layout
    whole, cut = heldout.patched(patch), heldout.patched(patch.truncated(options.cut_rank, layout))
    reports = matrix_reports(patch, layout, lowering.program)
    cosines = {report.name: report.cosine or 0.0 for report in reports}
    best = max(cosines, key=lambda name: cosines[name])
    return [
        f"{heldout.remaining(whole):.1%}",
        f"{whole.top1_agreement:.1%}",
        f"{heldout.remaining(cut):.1%}",
        f"{seconds:.0f}",
        f"{median(report.stable_rank for report in reports):.1f}",
        f"{median(report.rank_99 for report in reports):.0f}",
        f"{median(cosines.values()):.2f}",
        f"{best.split('layers.')[-1]} {cosines[best]:.2f}",
    ]


def main() -> None:
    """Print the lines of the table as they are measured, a few minutes each."""
    console = Console(width=200)
    with tempfile.TemporaryDirectory() as folder:
        run = ocean(SETTINGS, Path(folder), Progress())
        program = committed_program(run)
        lowering, heldout = lowering_of(run, program), HeldOut.of(run, program, HELD_OUT)
        tokens = sum(len(text.ids) for text in (*lowering.regression_texts, *lowering.training_texts))
        lines = [f"{program.describe()}; {tokens} tokens; KL(steered||base) {heldout.base.mean:.3f}"]
        lines += table(
            "weights | share | top-1 | cut to rank 8 | s | stable rank | 99 % rank | cosine, median | best", []
        )
        console.print("\n".join(lines), markup=False)
        for name, options in CONDITIONS.items():
            console.print(row((name, *condition(lowering, heldout, options))), markup=False)


if __name__ == "__main__":
    main()
