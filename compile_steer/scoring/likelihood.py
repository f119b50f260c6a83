"""Scorers of how a reply reads to the model itself: its perplexity under the base, and whether it came to an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import mean_logprobs
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.scoring.reply import Reply, Score, ScorerBase


class Perplexity(ScorerBase):
    """1 if the reply's perplexity under the base is within its limits, 0 for an empty reply: a guard.

    `max` is for the reply after its prompt: what the base would hardly say. `min` is for the reply alone, because
    after its prompt a model's own greedy answer is predictable too: Stolfo et al. (2410.12877) call a text degenerate
    below 2.5. Wrong for fluent text: what is false, off the subject or without the behaviour is as probable as what
    is right; and a loop of rare words is not predictable to a small model.
    """

    kind: Literal["perplexity"]
    max: float | None = Field(None, gt=1)
    min: float | None = Field(None, gt=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("give max, min, or both")
        return self

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002  (the model says it all)
        def score(replies: Sequence[Reply]) -> np.ndarray:
            good = np.array([bool(reply.text.strip()) for reply in replies])
            if self.max is not None:
                good &= perplexities(loaded, replies) <= self.max
            if self.min is not None:
                good &= perplexities(loaded, replies, alone=True) >= self.min
            return good.astype(float)

        return score

    def on_texts(self) -> str:
        return "the perplexity of a model's replies is not that of texts that somebody else wrote"


def perplexities(loaded: LoadedModel, replies: Sequence[Reply], *, alone: bool = False) -> np.ndarray:
    """Perplexity [n] of each reply's text after its prompt, or `alone`; infinite where there is no text."""
    tokenizer = loaded.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encoded(reply: Reply) -> Encoded:
        if not alone:
            return encode(tokenizer, Text(reply.prompt, reply.text))
        return Encoded((start, *tokenizer(reply.text, add_special_tokens=False)["input_ids"]), 1)

    result = np.full(len(replies), np.inf)
    said = [index for index, reply in enumerate(replies) if reply.text.strip()]
    result[said] = np.exp(-mean_logprobs(loaded, [encoded(replies[index]) for index in said]))
    return result


class Ended(ScorerBase):
    """1 if the model ended its turn by itself before the limit of new tokens.

    Wrong for a model that ends at once: an empty reply has ended too.
    """

    kind: Literal["ended"]

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002  (the reply says it all)
        return lambda replies: np.array([float(reply.ended) for reply in replies])

    def on_texts(self) -> str:
        return "whether a model ends its turn is not in the texts of the data"
