"""What programs do to a behaviour: log-likelihood margin, score, coherence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.pipeline.run import Run
from compile_steer.scoring.answers import Request, answer
from compile_steer.stats import Interval, bootstrap_mean
from compile_steer.steering.program import Program
from compile_steer.validation.evaluator import ContrastEvaluator

HEADER = "effect, nats/token | score | perplexity of control text | repetition | ended"


@dataclass(frozen=True)
class Reading:
    """One program: the change of each test pair's margin [n] (nats per token), the scores of answers to test prompts [m],
    perplexity of control text over the base's, repeated 3-grams and ended turns of the answers, one answer."""

    effects: np.ndarray
    scores: np.ndarray
    perplexity_ratio: float
    repetition: float
    ended: float
    sample: str

    def cells(self, seed: int) -> list[str]:
        """The columns of `HEADER`, with 95 % bootstrap intervals over pairs and prompts, and the answer's beginning."""
        effect, score = (bootstrap_mean(values, seed=seed) for values in (self.effects, self.scores))
        cost = [f"x{self.perplexity_ratio:.2f}", f"{self.repetition:.2f}", f"{self.ended:.0%}"]
        return [signed(effect), str(score), *cost, self.sample[:70]]


def signed(interval: Interval) -> str:
    """An interval of a change."""
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


@dataclass(frozen=True)
class Reader:
    """On how much each program is read."""

    run: Run
    pairs: int
    neutral: int
    prompts: int
    max_new_tokens: int

    def read(self, programs: Sequence[Program]) -> list[Reading]:
        """One reading for each program; they must share sites, operations and positions (their answers are one batch)."""
        model, data, recipe = self.run.model, self.run.data, self.run.recipe
        evaluator = ContrastEvaluator(model, data.test[: self.pairs], data.neutral[: self.neutral])
        prompts = [pair.prompt for pair in data.test[: self.prompts]]
        requests = [Request([*prompts, recipe.ask], program) for program in programs]
        answers = answer(model, requests, recipe.validate_.score.bind(model, data), self.max_new_tokens)
        return [
            Reading(
                effects,
                one.scores[:-1],
                evaluator.perplexity_ratio(program),
                float(one.repetition[:-1].mean()),
                float(one.ended[:-1].mean()),
                " ".join(one.texts[-1].split()),
            )
            for program, effects, one in zip(programs, evaluator.effects(programs), answers, strict=True)
        ]
