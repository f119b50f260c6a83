"""The ocean program on the embedded model: every target with what was measured, in one run.

Times are medians of interleaved repetitions, and ratios are against a limit measured in the same run: these
machines are shared, so an absolute time means little.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.ocean import HeldOut, compile_committed, lowering_of, ocean
from benchmarks.record import Record, formatted, machine, sections, table, timed
from compile_steer.common.progress import ProgressBars
from compile_steer.lowering import closed_form, distill
from compile_steer.lowering.job import Lowering
from compile_steer.models.forward import lm_head, run_blocks
from compile_steer.models.generate import neutral_generation
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import chunks
from compile_steer.models.reload import reload
from compile_steer.models.tokens import batches
from compile_steer.pipeline.artifacts import artifacts, verify
from compile_steer.pipeline.run import Run
from compile_steer.steering.patch import WeightPatch
from compile_steer.verification.parity import Parity

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
HELD_OUT, NEW_TOKENS = 48, 48
REPEATS, THROUGHPUT_REPEATS = 3, 7
RANDOM_EPOCHS = 3.0
RECORD = Record[None]("BENCHMARKS", "Benchmarks", "make bench")
Row = tuple[str, str, str, str]  # target, floor, aim, measured


def main() -> None:
    """Measure everything and write the page."""
    console = Console(width=132)
    with tempfile.TemporaryDirectory() as folder:
        run = ocean(SETTINGS, Path(folder), ProgressBars(console))
        compile_committed(run)
        parities = verify(run, artifacts(run))
        lowering = lowering_of(run, run.program)
        rows = [*fidelity(parities), *closed_form_cost(lowering), time_to_two_percent(run, lowering), throughput(run)]
        lines = report(rows, parities, sum(len(text.ids) for text in lowering.regression_texts), run.program_sha256)
    console.print(RECORD.save(*lines, "", *formatted(sections(RECORD.path))), markup=False)


def fidelity(parities: Sequence[Parity]) -> Iterator[Row]:
    """What the verifier measured of the artifacts on disk."""
    by_form = {(parity.backend, parity.form): parity for parity in parities}
    bias = by_form["bias", "merged-fp32"]
    near, trained = by_form["closed_form", "adapter"], by_form["distill", "adapter"]
    yield "`bias`, merged and reloaded: KL per token", "1e-6", "1e-8", f"{bias.divergence.kl.value:.1e}"
    yield "`bias`: top-1", "99.9 %", "", f"{bias.divergence.top1:.2%}"
    yield "`closed_form`: remaining KL", "1.0 %", "0.5 %", f"{near.divergence.kl_remaining.value:.3%}"
    yield "`closed_form`: top-1", "96 %", "", f"{near.divergence.top1:.2%}"
    remaining = f"{trained.divergence.kl_remaining.value:.3%}"
    yield "`distill` from the closed-form patch: remaining KL", "0.5 %", "0.2 %", remaining
    retained = ", ".join(f"{parity.backend} {parity.behaviour.effect_retained}" for parity in (bias, near, trained))
    yield "effect retained [95 %]", "0.90", "0.95", retained


def medians(repeats: int, *works: Callable[[], object]) -> list[float]:
    """The median seconds of each, run in turn A B A B ..., so that a drift of the machine hits all alike."""
    times = [[timed(work)[1] for work in works] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def closed_form_cost(lowering: Lowering) -> Iterator[Row]:
    """The solver's time over one plain pass over its calibration tokens, logits and all."""

    def forward() -> None:
        model = lowering.loaded.model
        for batch in batches(lowering.loaded, lowering.regression_texts):
            with torch.no_grad():
                hidden = run_blocks(model, batch.input_ids, batch.attention_mask)[batch.attention_mask.bool()]
                for part in chunks(len(hidden), model):
                    lm_head(model, hidden[part])

    writing = timed(lambda: lowering.regression_texts)[1]
    plain, solving = medians(REPEATS, forward, lambda: closed_form.lower(lowering))
    measured = f"{solving / plain:.2f} x ({solving:.1f} s over {plain:.1f} s); {(solving + writing) / plain:.2f} x with writing the texts"
    yield "`closed_form`: compile time over one forward pass of its calibration tokens", "3 x", "2 x", measured


def time_to_two_percent(run: Run, lowering: Lowering) -> Row:
    """Seconds until the held-out share is 2 %: regression against training from LoRA's own start."""
    heldout = HeldOut.of(run, run.program, HELD_OUT, NEW_TOKENS)
    program, few = lowering.program, lowering.regression_texts[:40]
    stages = [closed_form.Stage(program.first_layer, "mlp", 1)]

    def solve() -> WeightPatch:
        shorter = replace(lowering)
        shorter.__dict__["regression_texts"] = few
        return closed_form.lower(shorter, stages)

    (seconds,) = medians(REPEATS, solve)
    reached = heldout.remaining(heldout.patched(solve()))
    # Random init gets every text of both: more than the regression and the trained patch had.
    texts = [*lowering.regression_texts, *lowering.training_texts]
    plain = {"start": "random", "epochs": RANDOM_EPOCHS, "learning_rate": 0.02, "batch_tokens": 1024}
    options = lowering.options.model_copy(update={"distill": lowering.options.distill.model_copy(update=plain)})
    start = distill.random_patch(run.model.layout, program.first_layer, 8, run.recipe.seed)
    trained, spent = timed(
        lambda: distill.train_end_to_end(replace(lowering, options=options), texts, start, lambda _done: None)
    )
    share = heldout.remaining(heldout.patched(trained))
    measured = (
        f"{'' if share <= 0.02 else 'more than '}{spent / seconds:.0f} x (random init: {share:.1%} after {spent:.0f} s; "
        f"regression: {reached:.2%} after {seconds:.1f} s)"
    )
    return (
        "time to a 2 % share: `distill` from random init (r 8, all linear) over `closed_form`",
        "30 x",
        "100 x",
        measured,
    )


def throughput(run: Run) -> Row:
    """Tokens a second of cached generation, merged over base, run in turn."""
    base, merged = run.model, reload(run.paths.merged("bias", "fp32"), run.model)
    inputs = base.tokenizer(
        [text.prompt for text in run.data.heldout[:16]], return_tensors="pt", padding=True, padding_side="left"
    )

    def generate(model: LoadedModel) -> None:
        with torch.no_grad(), neutral_generation(model):
            model.model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)

    generate(merged)
    times = [[timed(partial(generate, model))[1] for model in (base, merged)] for _ in range(THROUGHPUT_REPEATS)]
    ratio = statistics.median(plain / other for plain, other in times)
    return "throughput of the merged model over base, cached generation", "0.98", "1.00", f"{ratio:.3f}"


def report(rows: Sequence[Row], parities: Sequence[Parity], tokens: int, program: str) -> list[str]:
    """The page below its head."""
    first, behaviour = parities[0].divergence, parities[0].behaviour
    return [
        f"{machine()} Program: `vectors/ocean.safetensors` (SHA-256 {program[:16]}), SmolLM2-135M-Instruct. "
        f"Calibration: {tokens} tokens. Held out: {first.n_tokens} response tokens of the steered model's own continuations of "
        f"{HELD_OUT} prompts on other topics, where KL(steered‖base) = {first.kl_base:.3f} nats/token, base top-1 "
        f"{first.top1_base:.1%}; {behaviour.n_pairs} test pairs.",
        "",
        *table(" | floor | aim | measured", rows),
        "",
        "Times are medians of runs in turn; random init is trained with AdamW, "
        f"{RANDOM_EPOCHS:g} epochs over the texts of both other backends.",
        "",
        *table(
            "artifact | KL | rms | p99 | remaining KL | top-1 | effect retained | control KL (steered's own) | seconds | ",
            (
                f"{parity.backend} {parity.form} | {(kl := parity.divergence).kl.value:.1e} | {kl.kl_rms:.1e} | {kl.kl_p99:.1e} | "
                f"{kl.kl_remaining.value:.3%} | {kl.top1:.2%} | {parity.behaviour.effect_retained} | "
                f"{kl.kl_control:.3f} ({kl.kl_control_steered:.3f}) | {parity.compile_seconds:.1f} | "
                + ("passed" if parity.passed else "FAILED: " + "; ".join(parity.reasons))
                for parity in parities
            ),
        ),
    ]


if __name__ == "__main__":
    main()
