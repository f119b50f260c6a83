"""What `verify` costs: eight artifacts of the demo's program, over one greedy evaluation of its prompts by the plain model.

    python -m benchmarks.verification_cost

Writes its section of docs/BENCHMARKS.md. Takes about eight minutes, a third of it to make the artifacts.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.__main__ import RECORD
from benchmarks.ocean import compile_committed, opened
from benchmarks.record import machine, prose, table, timed
from compile_steer.common.progress import ProgressBars
from compile_steer.models.generate import continue_prompts
from compile_steer.models.text import Text
from compile_steer.pipeline.artifacts import artifacts, verify
from tests.helpers.caches import use_own_cache

SETTINGS = ["compile.backends=[bias, closed_form, distill]", "verify.forms=[adapter, merged-fp32, merged-bf16]"]


def main() -> None:
    """Time both, one after the other, and write the section."""
    console = Console(width=132)
    with tempfile.TemporaryDirectory() as folder:
        run = opened("ocean", SETTINGS, Path(folder), ProgressBars(console))
        compile_committed(run)
        options, folders = run.recipe.verify, artifacts(run)
        prompts = [
            *run.data.heldout[: options.heldout],
            *(Text(pair.prompt) for pair in run.data.test[: options.prompts]),
        ]
        answers, once = timed(partial(continue_prompts, run.model, prompts, max_new_tokens=options.max_new_tokens))
        use_own_cache(Path(folder))
        parities, seconds = timed(partial(verify, run, folders))
        _, again = timed(partial(verify, run, folders))
    tokens = sum(len(text.ids) - text.n_prompt for text in answers)
    rows = [
        f"one greedy evaluation: {len(prompts)} prompts, {tokens} tokens | {once:.1f} | 1",
        f"`verify` of {len(parities)} artifacts | {seconds:.1f} | {seconds / once:.1f}",
        f"once more | {again:.1f} | {again / once:.1f}",
    ]
    setting = prose("verification: cost")
    lines = [f"{machine()} {setting}", "", *table("what | seconds | over one evaluation", rows)]
    console.print(RECORD.save_section("What verification costs", lines), markup=False)


if __name__ == "__main__":
    main()
