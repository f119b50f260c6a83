"""Seed A, instruct vectors: one trained vector a block makes an assistant of a model that only continues text."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.ocean import HeldOut, opened
from benchmarks.record import prose, table, timed
from compile_steer.common.progress import Advance, Progress
from compile_steer.extraction.options import ExtractOptions, TrainedOptions
from compile_steer.extraction.trained import Objective, Start, TrainedVectors, starting_point, train
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.logprobs import TokenDivergence, mean_logprobs
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.pipeline.artifacts import compile_program, merge
from compile_steer.pipeline.run import Run, load_base
from compile_steer.scoring.answers import Request, answer
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.program import Intervention, Program

HEADING = "A. Instruct vectors"
NEW_TOKENS = 32
COEFFICIENTS = (0.5, 1.0, 1.5)
THREE_SITES = ("attn_out", "mlp_out")
WEAK, FAST = 1.0, 0.05
LORA_RATES = (0.005, 0.03)
BIPO_BLOCK = 12


@dataclass(frozen=True)
class Outcome:
    """What a model does with the test prompts: answers that end [n], identity kept [n_identity], and -log p of a
    right answer's tokens, its end included, in nats a token [n]; answers to the rest that call it an assistant [m]."""

    ended: np.ndarray
    identity: np.ndarray
    unasked: np.ndarray
    nll: np.ndarray
    sample: str

    def cells(self, seed: int) -> list[str]:
        """The last four columns of the table, with 95 % intervals."""
        columns = (self.ended, self.identity, self.unasked, self.nll)
        return [
            f"{(mean := bootstrap_mean(c, seed=seed)).value:.2f} [{mean.low:.2f}, {mean.high:.2f}]" for c in columns
        ]


class Test:
    """The recipe's test prompts, some of which ask who is speaking."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.prompts = [pair.prompt for pair in run.data.test]
        self.asks = np.array(["AI assistant" in pair.positive.response for pair in run.data.test])

    def outcomes(self, loaded: LoadedModel, programs: Sequence[Program | None], before: str = "") -> list[Outcome]:
        """One a program, all as rows of one batch; `before` is put before every prompt."""
        prompts = [before + prompt for prompt in self.prompts]
        score = self.run.recipe.validate_.score.bind(loaded, self.run.data)
        found = answer(loaded, [Request(prompts, program) for program in programs], score, NEW_TOKENS)
        first = int(np.argmax(self.asks))
        return [
            Outcome(
                one.ended,
                one.scores[self.asks],
                one.scores[~self.asks],
                self._nll(loaded, program, prompts),
                one.texts[first],
            )
            for program, one in zip(programs, found, strict=True)
        ]

    def _nll(self, loaded: LoadedModel, program: Program | None, prompts: Sequence[str]) -> np.ndarray:
        end = int(loaded.tokenizer.eos_token_id or 0)
        pairs = zip(prompts, self.run.data.test, strict=True)
        encoded = [encode(loaded.tokenizer, Text(prompt, pair.positive.response)) for prompt, pair in pairs]
        closed = [Encoded((*one.ids, end), one.n_prompt) for one in encoded]
        return -mean_logprobs(loaded, closed, program)


# ----------------------------------------------------------------------------------------- trained


def vectors(run: Run, advance: Advance, **changes: object) -> tuple[Start, TrainedVectors, Program]:
    """Train as the recipe says, with changes; the program holds the kept vectors at coefficient 1."""
    options = run.recipe.extract.trained.model_copy(update=changes)
    extract = ExtractOptions(method="trained", trained=TrainedOptions.model_validate(options.model_dump()))
    pairs, loaded = run.data.train, run.model
    start = starting_point(loaded, pairs, extract)
    fitted = train(loaded, pairs, start, extract.trained, "all", run.recipe.seed, advance)
    parts = (Intervention(site, "add", v) for site, v in zip(start.sites, fitted.best, strict=True))
    return start, fitted, Program(tuple(parts), loaded.id, loaded.revision)


def lora(run: Run, rate: float, advance: Advance) -> tuple[LoadedModel, list[float]]:
    """A LoRA with as many parameters as the vectors, by the same loss, batches, optimizer and choice of the epoch.

    Rank 1 at the attention's output of every second block: (576 + 576) x 15 = 576 x 30.
    """
    loaded = run.model
    fresh = load_base(run.recipe)
    every_second = list(range(1, loaded.layout.n_layers, 2))
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["o_proj"], layers_to_transform=every_second)
    torch.manual_seed(run.recipe.seed)
    with quiet():
        wrapped = get_peft_model(fresh.model, config)
    one = replace(fresh, model=wrapped)
    factors = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    options, pairs = run.recipe.extract.trained, list(run.data.train)
    mixed = random.Random(run.recipe.seed).sample(pairs, len(pairs))
    objective = Objective(one, "likelihood", options.beta, 0)
    held_out = objective.prepare(mixed[::6], options.batch_tokens)
    seen = objective.prepare([p for n, p in enumerate(mixed) if n % 6], options.batch_tokens)
    optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(seen))
    empty, draw = Program((), one.id, one.revision), random.Random(run.recipe.seed)
    curve, best = [objective.evaluate(held_out, empty)], [factor.detach().clone() for factor in factors]
    for _epoch in range(options.epochs):
        for item in draw.sample(seen, len(seen)):
            optimizer.zero_grad()
            objective.loss(item, empty, 1.0).backward()
            optimizer.step()
            schedule.step()
        curve.append(objective.evaluate(held_out, empty))
        if curve[-1] == min(curve):
            best = [factor.detach().clone() for factor in factors]
        advance(1)
    with torch.no_grad():
        for factor, value in zip(factors, best, strict=True):
            factor.copy_(value)
    return one, curve


# ------------------------------------------------------------------------------------------ compiled


@dataclass(frozen=True)
class Compiled:
    """The merged checkpoint of the vectors, read from disk: its divergence, outcome, and the format it carries."""

    against: TokenDivergence
    base: TokenDivergence
    outcome: Outcome
    same_prompts: bool
    seconds: float


def compiled(run: Run, test: Test, program: Program) -> Compiled:
    """Compile with `bias`, merge in fp32 and read it again, as a user's stack would."""
    model = run.model
    program.save(run.paths.program)
    _, seconds = timed(lambda: compile_program(run, force=True))
    merged = reload(merge(run)[0], model)
    heldout = HeldOut.of(run, program, 16, NEW_TOKENS)
    (outcome,) = test.outcomes(merged, [None])
    same = all(encode(merged.tokenizer, Text(p)) == encode(model.tokenizer, Text(p)) for p in test.prompts)
    return Compiled(heldout.divergence_of(merged), heldout.base, outcome, same, seconds)


# -------------------------------------------------------------------------------------------- section

TRAININGS: Mapping[str, Mapping[str, object]] = {
    "a vector a block": {},
    "a vector a block, l2 0": {"l2": 0.0},
    f"a vector a block, l2 {WEAK:g}": {"l2": WEAK},
    f"a vector a block, l2 0, rate {FAST:g}": {"l2": 0.0, "learning_rate": FAST},
    f"a vector a block, rate {FAST:g}": {"learning_rate": FAST},
    # Two of the three are the same place for a shift, so a step at the same rate would go three times as far.
    "three sites a block": {"other_points": THREE_SITES, "learning_rate": 0.02 / 3},
    f"BiPO, one vector at block {BIPO_BLOCK}": {"loss": "bipo", "layers": (BIPO_BLOCK,)},
}


def section(progress: Progress) -> list[str]:
    """The Markdown of seed A, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        changes = ["compile.backends=[bias]", "verify.forms=[merged-fp32]"]
        run = opened("instruct", changes, Path(folder), progress)
        test, epochs = Test(run), run.recipe.extract.trained.epochs
        with progress.phase("seed A: training", epochs * (len(TRAININGS) + len(LORA_RATES))) as advance:
            trained = {name: vectors(run, advance, **changed) for name, changed in TRAININGS.items()}
            loras = {rate: lora(run, rate, advance) for rate in LORA_RATES}
        (base,) = test.outcomes(run.model, [None])
        (asked,) = test.outcomes(run.model, [None], f"{run.recipe.validate_.instruction} ")
        (own_template,) = test.outcomes(load(run.recipe.model, dtype=run.recipe.dtype), [None])
        found = {name: test.outcomes(run.model, [program])[0] for name, (_s, _f, program) in trained.items()}
        program = trained["a vector a block"][2]
        scaled = dict(
            zip(COEFFICIENTS, test.outcomes(run.model, [program.scaled(c) for c in COEFFICIENTS]), strict=True)
        )
        rate = min(loras, key=lambda one: min(loras[one][1]))
        adapted, curve = loras[rate]
        (lora_outcome,) = test.outcomes(adapted, [None])
        merged = compiled(run, test, program)
    seed = run.recipe.seed
    rows = [
        ("base, as it is", "0", "", "", *base.cells(seed)),
        ("base, told so in the prompt", "0", "", "", *asked.cells(seed)),
    ]
    for name, (start, fitted, _program) in trained.items():
        norms = f"{fitted.curves['norm'][0]:.3f}, {fitted.curves['norm'][-1]:.3f}"
        losses = _losses(fitted.curves["held_out"])
        rows.append((name, f"{start.vectors.numel():,}", losses, norms, *found[name].cells(seed)))
    name = f"LoRA, rank 1 at every second o_proj, rate {rate:g} (best of {len(LORA_RATES)})"
    size = sum(parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad)
    rows += [
        (name, f"{size:,}", _losses(curve), "", *lora_outcome.cells(seed)),
        ("the merged checkpoint of the first (`bias`)", "", "", "", *merged.outcome.cells(seed)),
        ("the model under its own chat template", "", "", "", *own_template.cells(seed)),
    ]
    return report(run, rows, scaled, merged, {"base": base, **found, "LoRA": lora_outcome})


def _losses(curve: Sequence[float]) -> str:
    return f"{curve[0]:.2f} to {min(curve):.2f}, last {curve[-1]:.2f}"


def report(
    run: Run,
    rows: Sequence[Sequence[str]],
    scaled: Mapping[float, Outcome],
    merged: Compiled,
    samples: Mapping[str, Outcome],
) -> list[str]:
    """The section, from what was measured."""
    data, options = run.data, run.recipe.extract.trained
    asks = [pair.prompt for pair in data.test if "AI assistant" in pair.positive.response]
    strengths = ", ".join(
        f"{c:g}: ended {one.ended.mean():.2f}, identity {one.identity.mean():.2f}" for c, one in scaled.items()
    )
    same = "the merged tokenizer puts prompts as the recipe does" if merged.same_prompts else "the prompts DIFFER"
    share = merged.against.mean / merged.base.mean
    settings = {"options": options, "format": run.recipe.prompt_format, "new_tokens": NEW_TOKENS}
    answers = "; ".join(f'{name}: "{" ".join(one.sample.split())}"' for name, one in samples.items())
    return [
        prose("seed A", n_train=len(data.train), n_test=len(data.test), n_asks=len(asks), **settings),
        "",
        *table("trained | parameters | held-out loss | norm | ended | identity | unasked | NLL", rows),
        "",
        f"- The first by its coefficient: {strengths}.",
        f"- Compiled by `bias` in {merged.seconds:.1f} s and read from disk: KL(steered‖compiled) {merged.against.mean:.1e} nats a token "
        f"(share {share:.1e} of KL(steered‖base) {merged.base.mean:.2f}), top-1 {merged.against.top1_agreement:.2%}; {same}.",
        f'- "{asks[0]}" {answers}.',
    ]
