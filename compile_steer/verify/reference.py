"""What every artifact is compared with: the base and the hooked model, run once on texts nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compile_steer.behaviour import Batch, Behaviour, Encoded, batches, encode
from compile_steer.generate import continue_prompts, response_text
from compile_steer.hooks import PAD, steered
from compile_steer.metrics import Divergence, divergence
from compile_steer.models import Loaded, load
from compile_steer.program import Program
from compile_steer.progress import Meter
from compile_steer.recipe import Recipe
from compile_steer.replay import run_span
from compile_steer.scoring import contrast_scores, encode_pairs, mean_log_probabilities, repetition


@dataclass(frozen=True)
class States:
    """Final hidden states of texts: `hidden` [n_tokens, d_model], and which tokens predict the response."""

    hidden: Tensor
    predicts: Tensor


@dataclass(frozen=True)
class Behaving:
    """How a model behaves: contrast per test pair, scores and repetition per test prompt, the sample answer."""

    contrast: np.ndarray
    scores: np.ndarray
    repetition: np.ndarray
    sample: str


def _hooks(loaded: Loaded, program: Program | None, roles: Tensor | None = None) -> AbstractContextManager[None]:
    return nullcontext() if program is None else steered(loaded.model, program, roles=roles)


def final_states(loaded: Loaded, encoded: Sequence[Encoded], program: Program | None = None) -> States:
    """Run the whole model, hooked with `program` if given, and keep the real tokens' final hidden states."""
    hidden, predicts = [], []
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        with _hooks(loaded, program, batch.roles), torch.no_grad():
            final = run_span(loaded.model, batch.input_ids, batch.attention_mask)
        real = batch.roles != PAD
        hidden.append(final[real])
        predicts.append(batch.predicts_response[real].cpu())
    return States(torch.cat(hidden), torch.cat(predicts))


def behave(loaded: Loaded, behaviour: Behaviour, recipe: Recipe, program: Program | None = None) -> Behaving:
    """Score test pairs and answers to test prompts; free-running generation, greedy."""
    scorer, n = recipe.validate_.score, recipe.verify.prompts
    pairs = encode_pairs(loaded, behaviour.test)
    prompts = [pair.prompt for pair in behaviour.test[:n]]

    def final(batch: Batch) -> Tensor:
        with _hooks(loaded, program, batch.roles):
            return run_span(loaded.model, batch.input_ids, batch.attention_mask)

    contrast = contrast_scores(mean_log_probabilities(loaded, pairs, final=final))
    with _hooks(loaded, program):
        answers = continue_prompts(loaded, [*prompts, recipe.ask], max_new_tokens=recipe.verify.max_new_tokens)
    *texts, sample = [response_text(loaded, one) for one in answers]
    return Behaving(
        contrast, np.array([scorer.score(t) for t in texts]), np.array([repetition(t) for t in texts]), sample
    )


class Reference:
    """Base and steered model on held-out continuations, neutral text, test pairs and test prompts."""

    def __init__(self, recipe: Recipe, base: Loaded, program: Program, behaviour: Behaviour, meter: Meter) -> None:
        self.recipe, self.base, self.program, self.behaviour = recipe, base, program, behaviour
        with meter.phase("reference: base and steered model", 5) as tick:
            with steered(base.model, program):
                self.heldout = continue_prompts(
                    base,
                    behaviour.heldout,
                    max_new_tokens=recipe.verify.max_new_tokens,
                    temperature=1.0,
                    seed=recipe.seed + 1,
                )
            tick(1)
            self.neutral = [encode(base.tokenizer, text) for text in behaviour.neutral]
            self.base_heldout, self.steered_heldout = (final_states(base, self.heldout, p) for p in (None, program))
            tick(1)
            self.base_neutral, steered_neutral = (final_states(base, self.neutral, p) for p in (None, program))
            self.base_divergence = self.from_steered(base, self.base_heldout)
            self.neutral_drift = self.drift(base, steered_neutral)
            tick(1)
            self.base_behaving = behave(base, behaviour, recipe)
            tick(1)
            self.steered_behaving = behave(base, behaviour, recipe, program)
            tick(1)

    def from_steered(self, other: Loaded, states: States) -> Divergence:
        """KL(steered || other) of every held-out token."""
        return divergence(self.base.model, self.steered_heldout.hidden, other.model, states.hidden)

    def drift(self, other: Loaded, states: States) -> float:
        """Mean KL(base || other) over the neutral responses, nats a token."""
        found = divergence(self.base.model, self.base_neutral.hidden, other.model, states.hidden)
        return float(found.kl[states.predicts].mean())

    def precision_noise(self, dtype: torch.dtype) -> Divergence:
        """KL(steered || steered with the base's weights rounded to `dtype`) at the positions that count."""
        rounded = load(self.recipe.model, device=str(self.base.device), dtype=self.recipe.dtype)
        with torch.no_grad():
            for parameter in rounded.model.parameters():
                parameter.copy_(parameter.to(dtype))
        return self.from_steered(rounded, final_states(rounded, self.heldout, self.program))
