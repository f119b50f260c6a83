"""Seed A, instruct vectors: one trained vector a block makes an assistant of a model that only continues text.

python -m benchmarks.seeds.a
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console

from benchmarks.record import ROOT
from compile_steer.common.progress import Advance, Progress, ProgressBars
from compile_steer.extraction.options import ExtractOptions, TrainedOptions
from compile_steer.extraction.trained import Objective, Start, TrainedVectors, starting_point, train
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel, load, quiet
from compile_steer.models.logprobs import TokenDivergence, divergence, final_states, mean_logprobs
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.pipeline.artifacts import compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from compile_steer.scoring.answers import Request, answer
from compile_steer.stats import bootstrap_mean
from compile_steer.steering.program import Intervention, Program

NEW_TOKENS = 32
DIALS = (0.5, 1.0, 1.5)
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

    def cells(self, seed: int) -> str:
        """The four columns of the table, with 95 % intervals."""
        columns = (self.ended, self.identity, self.unasked, self.nll)
        return " | ".join(_interval(column, seed) for column in columns)


def _interval(values: np.ndarray, seed: int) -> str:
    found = bootstrap_mean(values, seed=seed)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


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


# ------------------------------------------------------------------------------------------- arms


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
    fresh = load(run.recipe.model, dtype=run.recipe.dtype, prompt_format=run.recipe.prompt_format)
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


def _size(wrapped: object) -> int:
    assert isinstance(wrapped, PeftModel)
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


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
    loaded = run.model
    program.save(run.paths.program)
    started = time.perf_counter()
    compile_program(run, force=True)
    seconds = time.perf_counter() - started
    (folder,) = merge(run)
    merged = reload(folder, loaded)
    texts = continue_prompts(loaded, run.data.heldout[:16], program, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
    wanted = final_states(loaded, texts, program).response
    (outcome,) = test.outcomes(merged, [None])
    same = all(
        encode(merged.tokenizer, Text(prompt)) == encode(loaded.tokenizer, Text(prompt)) for prompt in test.prompts
    )
    return Compiled(
        divergence(loaded.model, wanted, merged.model, final_states(merged, texts).response),
        divergence(loaded.model, wanted, loaded.model, final_states(loaded, texts).response),
        outcome,
        same,
        seconds,
    )


# -------------------------------------------------------------------------------------------- section

ARMS: Mapping[str, Mapping[str, object]] = {
    "a vector a block": {},
    "a vector a block, l2 0": {"l2": 0.0},
    f"a vector a block, l2 {WEAK:g}": {"l2": WEAK},
    f"a vector a block, l2 0, rate {FAST:g}": {"l2": 0.0, "learning_rate": FAST},
    f"a vector a block, rate {FAST:g}": {"learning_rate": FAST},
    # Two of the three are the same place for a shift, so a step at the same rate would go three times as far.
    "three sites a block": {"beside": THREE_SITES, "learning_rate": 0.02 / 3},
    f"BiPO, one vector at block {BIPO_BLOCK}": {"loss": "bipo", "layers": (BIPO_BLOCK,)},
}


def section(progress: Progress) -> list[str]:
    """The Markdown of seed A, measured now."""
    with tempfile.TemporaryDirectory() as folder:
        changes = ["compile.backends=[bias]", "verify.forms=[merged-fp32]"]
        run = Run.open(read_recipe(ROOT / "recipes" / "instruct.yaml", changes), Path(folder), progress)
        test, seed = Test(run), run.recipe.seed
        arms = {}
        epochs = run.recipe.extract.trained.epochs
        with progress.phase("seed A: training", epochs * (len(ARMS) + len(LORA_RATES))) as advance:
            for name, changed in ARMS.items():
                arms[name] = vectors(run, advance, **changed)
            loras = {rate: lora(run, rate, advance) for rate in LORA_RATES}
        with progress.phase("seed A: test prompts", 3) as advance:
            (base,) = test.outcomes(run.model, [None])
            (asked,) = test.outcomes(run.model, [None], f"{run.recipe.validate_.instruction} ")
            (chatting,) = test.outcomes(load(run.recipe.model, dtype=run.recipe.dtype), [None])
            advance(1)
            found = {name: test.outcomes(run.model, [program])[0] for name, (_s, _f, program) in arms.items()}
            program = arms["a vector a block"][2]
            dial = dict(zip(DIALS, test.outcomes(run.model, [program.scaled(c) for c in DIALS]), strict=True))
            advance(1)
            rate = min(loras, key=lambda one: min(loras[one][1]))
            (adapted,) = test.outcomes(loras[rate][0], [None])
            advance(1)
        merged = compiled(run, test, program)
    rows = [
        f"| base, as it is | 0 | | | {base.cells(seed)} |",
        f"| base, told so in the prompt | 0 | | | {asked.cells(seed)} |",
    ]
    rows += [_row(name, *arms[name][:2], found[name], seed) for name in ARMS]
    curve = loras[rate][1]
    rows.append(
        f"| LoRA, rank 1 at every second o_proj, rate {rate:g} (best of {len(LORA_RATES)}) | {_size(loras[rate][0].model):,} | "
        f"{curve[0]:.2f} to {min(curve):.2f}, last {curve[-1]:.2f} | | {adapted.cells(seed)} |"
    )
    rows.append(f"| the merged checkpoint of the first (`bias`) | | | | {merged.outcome.cells(seed)} |")
    rows.append(f"| the model under its own chat template | | | | {chatting.cells(seed)} |")
    return _page(run, rows, dial, merged, {"base": base, **found, "LoRA": adapted})


def _row(name: str, start: Start, fitted: TrainedVectors, outcome: Outcome, seed: int) -> str:
    curve, norms = fitted.curves["held_out"], fitted.curves["norm"]
    return (
        f"| {name} | {start.vectors.numel():,} | {curve[0]:.2f} to {min(curve):.2f}, last {curve[-1]:.2f} | "
        f"{norms[0]:.3f}, {norms[-1]:.3f} | {outcome.cells(seed)} |"
    )


def _page(
    run: Run, rows: list[str], dial: Mapping[float, Outcome], merged: Compiled, samples: Mapping[str, Outcome]
) -> list[str]:
    behaviour, options = run.data, run.recipe.extract.trained
    asks = int(sum("AI assistant" in pair.positive.response for pair in behaviour.test))
    turned = ", ".join(
        f"{c:g}: ended {one.ended.mean():.2f}, identity {one.identity.mean():.2f}" for c, one in dial.items()
    )
    same = "the merged tokenizer puts prompts as the recipe does" if merged.same_prompts else "the prompts DIFFER"
    prompt = next(pair.prompt for pair in behaviour.test if "AI assistant" in pair.positive.response)
    share = merged.against.mean / merged.base.mean
    return [
        "## A. Instruct vectors",
        "",
        f"`recipes/instruct.yaml`, {options.epochs} epochs. No base checkpoint is installed, so the embedded model is asked outside "
        f"its chat template, as `{run.recipe.prompt_format!r}`: there it goes on like a base model. "
        f"{len(behaviour.train)} conversations, a sixth of them to choose the epoch; "
        f"{len(behaviour.test)} test prompts in other words, {asks} of which ask who is speaking; greedy, up "
        f"to {NEW_TOKENS} tokens. l2 is {options.l2:g} and the rate {options.learning_rate:g} (norms of the stream a step) where nothing "
        "else is said. Held-out loss: nats a token (BiPO: its loss) before training, at its lowest, at the end; norm: the vectors' mean "
        "over the stream's, after the first and the last epoch. Ended: closed its turn itself, with the tokenizer's end of turn; "
        "identity: says that it is an assistant when asked, unasked: where it was not; NLL: of right test answers, nats a token. Bootstrap "
        "95 % intervals over prompts.",
        "",
        "| arm | parameters | held-out loss | norm | ended | identity | unasked | NLL |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"- The dial of the first: {turned}.",
        f"- Compiled by `bias` in {merged.seconds:.1f} s and read from disk: KL(steered‖compiled) {merged.against.mean:.1e} nats a token "
        f"(share {share:.1e} of KL(steered‖base) {merged.base.mean:.2f}), top-1 {merged.against.top1_agreement:.2%}; {same}.",
        f'- "{prompt}" '
        + "; ".join(f'{name}: "{" ".join(one.sample.split())}"' for name, one in samples.items())
        + ".",
    ]


def main() -> None:
    """Measure and print."""
    console = Console(width=160)
    started = time.perf_counter()
    lines = section(ProgressBars(console))
    console.print("\n".join(lines), markup=False)
    console.print(f"{math.ceil(time.perf_counter() - started)} s")


if __name__ == "__main__":
    main()
