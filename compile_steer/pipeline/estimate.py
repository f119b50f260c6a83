"""How long a run will take, said before the work: counted in tokens, at a speed that is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean

import torch

from compile_steer.models.forward import run_blocks
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.pipeline.run import Run
from compile_steer.validation.sweep import choose_layers

# Measured on the embedded model and 2 CPU cores. A written token costs as much as so many that are read; every program
# leaves out the blocks below it.
_WRITTEN = 4.0
_ABOVE = 0.65
_TRAINED = 3.0  # forward and backward
_COMPARED = 2.0  # read, and the whole distribution compared with another
_START = 30.0  # seconds until two processes have their libraries and the model


def estimate(run: Run) -> float:
    """Minutes that all stages of a run take from nothing; right to about a half."""
    tokens = _validation(run) + _compile(run) + _verification(run)
    return (_START + tokens * _seconds_per_token(run)) / 60


def _seconds_per_token(run: Run) -> float:
    """Of one that is read, in a batch of 4 x 64; the second of two times, as the first one warms up."""
    ids = torch.full((4, 64), run.model.pad_id, device=run.model.device)
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            run_blocks(run.model.model, ids, torch.ones_like(ids)).sum().item()
    return (time.perf_counter() - started) / ids.numel()


def _lengths(run: Run) -> tuple[float, float, float]:
    """Mean tokens of a contrast pair, of a control text and of a prompt."""
    data, tokenizer = run.data, run.model.tokenizer

    def length(texts: Sequence[Text]) -> float:
        return mean(len(encode(tokenizer, text).ids) for text in texts[:8])

    positive, negative = (length([getattr(pair, side) for pair in data.test]) for side in ("positive", "negative"))
    prompt = length([Text(pair.prompt) for pair in data.test])
    return max(positive + negative - prompt, 1.0), length(data.neutral), prompt


def _validation(run: Run) -> float:
    options, data = run.recipe.validate_, run.data
    pair, control, prompt = _lengths(run)
    layers = len(choose_layers(options, run.model.layout.n_layers))
    points = len(options.coefficients) if isinstance(options.coefficients, tuple) else 6
    answer = prompt + _WRITTEN * options.max_new_tokens
    controls = options.random_directions + run.recipe.extract.shuffled + 3
    tested = min(options.pairs, len(data.test))
    tokens = len(data.train) * pair
    tokens += layers * points * _ABOVE * (options.sweep_pairs * pair + options.sweep_neutral * control)
    tokens += (1 + min(layers, options.sweep_layers) * points) * options.sweep_prompts * answer
    tokens += tested * pair * (2 + _ABOVE) + len(data.neutral) * control * (2 + _ABOVE)
    tokens += controls * options.control_pairs * pair * _ABOVE
    tokens += 10 * options.dose_prompts * ((pair + control) * _ABOVE + answer)
    conditions = 3 + bool(options.instruction) + bool(options.few_shot)
    tokens += min(options.prompts, len(data.test)) * (conditions * answer + options.few_shot * pair / 2)
    tokens += 8 * options.wordings * (pair + control) * (1 + _ABOVE)
    # Side effects, of base and steered model.
    return tokens + 2 * (options.questions * 3 * prompt + 2 * options.control_prompts * answer)


def _compile(run: Run) -> float:
    options, prompt = run.recipe.compile, _lengths(run)[2]
    texts, length = options.calibration.prompts, options.calibration.max_new_tokens
    backends = {"closed_form"} if options.backends == "auto" else set(options.backends)
    tokens = 0.0
    if backends - {"bias", "orthogonalise", "retarget"}:
        tokens += texts * (prompt + _WRITTEN * length) + 4 * texts * (prompt + length)
    training = options.distill.prompts * (prompt + length)
    if "distill" in backends:
        block = options.distill.block_steps * options.distill.block_batch_tokens / run.model.layout.n_layers
        tokens += _TRAINED * (block + options.distill.epochs * training) + _WRITTEN * training
    if backends & {"full", "full_cut"}:
        tokens += _TRAINED * options.full.epochs * (training + texts * (prompt + length))
    return tokens


def _verification(run: Run) -> float:
    options, (pair, control, prompt) = run.recipe.verify, _lengths(run)
    backends = run.recipe.compile.backends
    # A merge in full precision takes over what its adapter measured; half of the samples decide a score on average.
    forms = max(1, len(options.forms) - ("merged-fp32" in options.forms)) * (1 if backends == "auto" else len(backends))
    new, sampled = options.max_new_tokens, options.samples_per_prompt * (options.heldout + options.prompts) / 2
    answer = prompt + _WRITTEN * new
    sets = 3 * options.prompts_per_set * 2 * (2 * prompt + _WRITTEN * options.free_tokens)
    sets += options.long * (options.long_tokens + 3 * _WRITTEN * options.free_tokens)
    # What every model does: the base, the steered one, and each file.
    each = _COMPARED * (options.heldout * (prompt + new) + options.pairs * pair + options.neutral * control + sets)
    each += options.prompts * answer + options.capability * (prompt + 8 * _WRITTEN)
    return 2 * each + options.heldout * answer + sampled * answer + forms * (each + sampled * (prompt + new))
