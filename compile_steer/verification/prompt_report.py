"""What the verifier reports of one set of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compile_steer.stats import Interval

PromptSetName = Literal["held-out", "off-topic", "multi-turn", "long"]  # the last in earlier reports


@dataclass(frozen=True)
class ContextLength:
    """Divergence where held-out answers are predicted behind at least `start` and fewer than `stop` tokens."""

    start: int
    stop: int
    n_tokens: int
    n_responses: int
    kl: float  # mean KL(steered||compiled)
    kl_base: float  # mean KL(steered||base)
    kl_remaining: Interval  # their ratio, with its 95 % bootstrap interval over responses
    top1: float  # agreement of compiled and steered

    def __str__(self) -> str:
        remaining = self.kl_remaining
        return (
            f"{self.start:,} to {self.stop:,}: {remaining.value:.2%} [{remaining.low:.2%}, {remaining.high:.2%}] of "
            f"{self.n_responses} answers"
        )


@dataclass(frozen=True)
class FreeAnswers:
    """Answers to the prompts of one set that each model writes by itself; sampled ones with the same random numbers."""

    same: float  # mean fraction of the steered answer's tokens before the first that differs in the compiled model's
    same_base: float  # and in the base's
    repetition: float  # mean fraction of repeated 3-grams in the compiled model's answers
    repetition_steered: float
    score: float | None = None  # mean of the compiled model's; None where the scorer knows only the data's prompts
    score_steered: float | None = None
    score_base: float | None = None


@dataclass(frozen=True)
class PromptKL:
    """Divergence on the steered model's sampled answers to some prompts."""

    name: str
    n_texts: int
    n_tokens: int  # response tokens of these answers, those of earlier turns included
    prompt_tokens: int  # of the longest prompt
    kl: float  # mean KL(steered||compiled)
    kl_remaining: float | None  # its fraction of KL(steered||base); None where that is 0
    top1: float  # agreement of compiled and steered


@dataclass(frozen=True)
class PromptSet(PromptKL):
    """One set of prompts, with freely written answers beside the divergence."""

    greedy: FreeAnswers
    sampled: FreeAnswers

    def __str__(self) -> str:
        remaining = "" if self.kl_remaining is None else f" ({self.kl_remaining:.2%})"
        return f"{self.greedy.same:.0%}, {self.sampled.same:.0%}{remaining}"
