"""The ocean program on the embedded model: every target with what was measured, in one run.

Times are medians of interleaved repetitions, and ratios are against a limit measured in the same run: these
machines are shared, so an absolute time means little.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.ocean import ROOT, machine, ocean
from compile_steer.artifacts.files import save_text, sha256
from compile_steer.common.progress import ProgressBars
from compile_steer.lowering import closed_form, distill
from compile_steer.lowering.lowering import Lowering
from compile_steer.models.forward import lm_head, run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import CHUNK_TOKENS, final_states
from compile_steer.models.tokens import batches
from compile_steer.pipeline.artifacts import artifacts, compile_program, make_reference, merge, verify
from compile_steer.pipeline.run import Run
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.verification.parity import Parity
from compile_steer.verification.reference import Reference

SETTINGS = [
    "compile.backends=[bias, closed_form, distill]",
    "compile.calibration.prompts=200",
    "compile.calibration.max_new_tokens=80",
    "compile.distill.prompts=40",
    "compile.distill.block_steps=1000",
    "verify.heldout=48",
    "verify.pairs=48",
    "verify.neutral=30",
    "verify.prompts=16",
    "verify.max_new_tokens=48",
]
REPEATS = 3
RANDOM_EPOCHS = 3.0


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    floor: str
    aim: str
    measured: str


def main() -> None:
    """Measure everything and write the page."""
    console = Console(width=132)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        shutil.copytree(ROOT / "vectors", out / "vectors")
        run = ocean(SETTINGS, out, ProgressBars(console))
        compile_program(run)
        merge(run)
        parities = {(p.backend, p.form): p for p in verify(run, artifacts(run))}
        job = _job(run)
        reference = make_reference(run)
        rows = _fidelity(parities) + _closed_form_cost(run, job) + _time_to_two_percent(run, job, reference)
        rows += _throughput(run, out)
        tokens = sum(len(text.ids) for text in job.regression_texts)
        page = _page(rows, list(parities.values()), tokens, sha256(run.paths.program))
    save_text(ROOT / "docs" / "BENCHMARKS.md", page)
    console.print(page, markup=False)


def _job(run: Run) -> Lowering:
    recipe = run.recipe
    return Lowering(canonical(run.program), run.model, run.data.calibration, recipe.compile, recipe.seed, run.progress)


def _fidelity(parities: dict[tuple[str, str], Parity]) -> list[Row]:
    bias = parities["bias", "merged-fp32"]
    near, trained = parities["closed_form", "adapter"], parities["distill", "adapter"]
    retained = ", ".join(f"{p.backend} {p.behaviour.effect_retained}" for p in (bias, near, trained))
    return [
        Row("`bias`, merged and reloaded: KL per token", "1e-6", "1e-8", f"{bias.divergence.kl.value:.1e}"),
        Row("`bias`: top-1", "99.9 %", "", f"{bias.divergence.top1:.2%}"),
        Row("`closed_form`: remaining KL", "1.0 %", "0.5 %", f"{near.divergence.kl_remaining.value:.3%}"),
        Row("`closed_form`: top-1", "96 %", "", f"{near.divergence.top1:.2%}"),
        Row(
            "`distill` from the closed-form patch: remaining KL",
            "0.5 %",
            "0.2 %",
            f"{trained.divergence.kl_remaining.value:.3%}",
        ),
        Row("effect retained [95 %]", "0.90", "0.95", retained),
    ]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _medians(*works: Callable[[], object]) -> list[float]:
    """The median seconds of each, run in turn A B A B ..., so that a drift of the machine hits all alike."""
    times = [[_timed(work) for work in works] for _ in range(REPEATS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _forward(run: Run, job: Lowering) -> None:
    """One plain pass over the calibration tokens, logits and all."""
    model = run.model.model
    for batch in batches(run.model, job.regression_texts):
        with torch.no_grad():
            hidden = run_blocks(model, batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()]
            for start in range(0, len(hidden), CHUNK_TOKENS):
                lm_head(model, hidden[start : start + CHUNK_TOKENS])


def _closed_form_cost(run: Run, job: Lowering) -> list[Row]:
    writing = _timed(lambda: job.regression_texts)
    forward, solving = _medians(lambda: _forward(run, job), lambda: closed_form.lower(job))
    return [
        Row(
            "`closed_form`: compile time over one forward pass of its calibration tokens",
            "3 x",
            "2 x",
            f"{solving / forward:.2f} x ({solving:.1f} s over {forward:.1f} s); "
            f"{(solving + writing) / forward:.2f} x with writing the texts",
        )
    ]


def _remaining_kl(reference: Reference, patch: WeightPatch) -> float:
    """Held-out remaining KL of a patch in memory."""
    base = reference.model
    with with_patch(base.model, patch):
        states = final_states(base, reference.heldout)
    return reference.kl_from_steered(base, states).mean / reference.kl_base.mean


def _time_to_two_percent(run: Run, job: Lowering, reference: Reference) -> list[Row]:
    """Seconds until the held-out share is 2 %: regression against training from LoRA's own start."""
    few = job.regression_texts[:40]
    stages = [closed_form.Stage(job.program.first_layer, "mlp", 1)]
    patches = []

    def solve() -> None:
        patches.append(closed_form.solve_stages(job.program, run.model, few, stages, lambda _n: None).patch)

    (seconds,) = _medians(solve)
    reached = _remaining_kl(reference, patches[-1])
    # Random init gets every text of both: more than the regression and the trained patch had.
    texts = [*job.regression_texts, *job.training_texts]
    plain = {"start": "random", "epochs": RANDOM_EPOCHS, "learning_rate": 0.02, "batch_tokens": 1024}
    options = run.recipe.compile.model_copy(update={"distill": run.recipe.compile.distill.model_copy(update=plain)})
    random = replace(job, options=options)
    start = distill.random_patch(run.model.layout, job.program.first_layer, 8, run.recipe.seed)
    trained: list[WeightPatch] = []

    def train() -> None:
        trained.append(distill.train_end_to_end(random, texts, start, lambda _n: None))

    spent = _timed(train)
    share = _remaining_kl(reference, trained[0])
    more = "" if share <= 0.02 else "more than "
    return [
        Row(
            "time to a 2 % share: `distill` from random init (r 8, all linear) over `closed_form`",
            "30 x",
            "100 x",
            f"{more}{spent / seconds:.0f} x (random init: {share:.1%} after {spent:.0f} s; regression: {reached:.2%} after "
            f"{seconds:.1f} s)",
        )
    ]


def _throughput(run: Run, out: Path) -> list[Row]:
    """Tokens a second of cached generation, merged over base, both loaded alike and run in turn."""
    merged = AutoModelForCausalLM.from_pretrained(out / "merged" / "ocean-bias-fp32", dtype=torch.float32).eval()
    prompts = [text.prompt for text in run.data.heldout[:16]]
    plain = replace(run.model, model=merged)

    def generate(loaded: LoadedModel) -> None:
        inputs = loaded.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            loaded.model.generate(**inputs, max_new_tokens=48, min_new_tokens=48, do_sample=False)

    generate(plain)
    pairs = [(_timed(lambda: generate(run.model)), _timed(lambda: generate(plain))) for _ in range(7)]
    ratio = statistics.median(base / other for base, other in pairs)
    return [Row("throughput of the merged model over base, cached generation", "0.98", "1.00", f"{ratio:.3f}")]


def _page(rows: Sequence[Row], parities: Sequence[Parity], tokens: int, program: str) -> str:
    first, behaviour = parities[0].divergence, parities[0].behaviour
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit.",
        "",
        f"{machine()} Program: `vectors/ocean.safetensors` (SHA-256 {program[:16]}), SmolLM2-135M-Instruct. "
        f"Calibration: {tokens} tokens. Held out: {first.n_tokens} response tokens of the steered model's own continuations of "
        f"{SETTINGS[5].split('=')[1]} prompts on "
        f"other topics, where KL(steered‖base) = {first.kl_base:.3f} nats/token, base top-1 {first.top1_base:.1%}; "
        f"{behaviour.n_pairs} test pairs.",
        "",
        "| | floor | aim | measured |",
        "|---|---|---|---|",
        *(f"| {row.what} | {row.floor} | {row.aim} | {row.measured} |" for row in rows),
        "",
        "Times are medians of runs in turn; random init is trained with AdamW, "
        f"{RANDOM_EPOCHS:g} epochs over the texts of both other backends.",
        "",
        "| artifact | KL | rms | p99 | remaining KL | top-1 | effect retained | control KL (steered's own) | seconds | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {p.backend} {p.form} | {p.divergence.kl.value:.1e} | {p.divergence.kl_rms:.1e} | {p.divergence.kl_p99:.1e} | "
            f"{p.divergence.kl_remaining.value:.3%} | {p.divergence.top1:.2%} | {p.behaviour.effect_retained} | "
            f"{p.divergence.kl_control:.3f} ({p.divergence.kl_control_steered:.3f}) | {p.compile_seconds:.1f} | "
            f"{'passed' if p.passed else 'FAILED: ' + '; '.join(p.reasons)} |"
            for p in parities
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
