"""What programs do to a behaviour, dose by dose: contrast, score, coherence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.models.logprobs import encode_pairs, logprob_margins, mean_logprobs
from compile_steer.models.tokens import encode
from compile_steer.pipeline.run import Run
from compile_steer.scoring.answers import Request, answer
from compile_steer.stats import Interval, bootstrap_mean
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Reading:
    """One program: the change of each test pair's contrast [n] (nats a token), the scores of answers to test
    prompts [m], neutral perplexity over the base's, repeated 3-grams and ended turns of the answers, one answer."""

    effects: np.ndarray
    scores: np.ndarray
    perplexity_ratio: float
    repetition: float
    ended: float
    sample: str

    def row(self, seed: int) -> str:
        """Cells of a Markdown table, with 95 % bootstrap intervals over pairs and prompts."""
        effect, score = (bootstrap_mean(values, seed=seed) for values in (self.effects, self.scores))
        return f"{signed(effect)} | {score} | x{self.perplexity_ratio:.2f} | {self.repetition:.2f} | {self.ended:.0%}"


HEADER = "effect, nats/token | score | neutral perplexity | repetition | ended"
RULE = "---|---|---|---|---"


def signed(interval: Interval) -> str:
    """An interval of a change."""
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


@dataclass(frozen=True)
class Dial:
    """How much is read at each setting."""

    run: Run
    pairs: int
    neutral: int
    prompts: int
    max_new_tokens: int

    def read(self, programs: Sequence[Program]) -> list[Reading]:
        """One reading a program; they must share sites, operations and positions (their answers are one batch)."""
        loaded, behaviour, recipe = self.run.model, self.run.data, self.run.recipe
        pairs = encode_pairs(loaded, behaviour.test[: self.pairs])
        base = logprob_margins(loaded, pairs)
        effects = [logprob_margins(loaded, pairs, program) - base for program in programs]
        neutral = self._neutral(None)
        ratios = [float(np.exp(neutral - self._neutral(program))) for program in programs]
        prompts = [pair.prompt for pair in behaviour.test[: self.prompts]]
        score = recipe.validate_.score.bind(loaded, behaviour)
        requests = [Request([*prompts, recipe.ask], program) for program in programs]
        answers = answer(loaded, requests, score, self.max_new_tokens)
        return [
            Reading(
                effect,
                one.scores[:-1],
                ratio,
                float(one.repetition[:-1].mean()),
                float(one.ended[:-1].mean()),
                " ".join(one.texts[-1].split()),
            )
            for effect, ratio, one in zip(effects, ratios, answers, strict=True)
        ]

    def _neutral(self, program: Program | None) -> float:
        """Mean log-probability of the neutral responses, nats a token."""
        loaded = self.run.model
        texts = [encode(loaded.tokenizer, text) for text in self.run.data.neutral[: self.neutral]]
        return float(mean_logprobs(loaded, texts, program).mean())
