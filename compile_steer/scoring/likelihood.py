"""Scorers of how a reply reads to the model itself: its perplexity under the base, and whether it came to an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compile_steer.behaviour import Behaviour
from compile_steer.contrast import mean_log_probabilities
from compile_steer.models import Loaded
from compile_steer.scoring.reply import Reply, Score, ScorerBase
from compile_steer.tokens import Text, encode


class Perplexity(ScorerBase):
    """1 if the reply's perplexity under the base, given its prompt, is at most `max` and at least `min`.

    Text that is too predictable is a loop: Stolfo et al. (2410.12877) call a text degenerate below 2.5. They read
    the text alone with GPT-2; here the base reads it after its prompt, to which its own greedy answers are
    predictable too, so a `min` belongs well below theirs. Wrong for fluent text: what is false, off the subject or
    against the behaviour is as probable as what is right. An empty reply is 0.
    """

    kind: Literal["perplexity"]
    max: float = Field(gt=1)
    min: float = Field(1.0, ge=1)

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"no perplexity is at least {self.min:g} and at most {self.max:g}")
        return self

    def bind(self, loaded: Loaded, behaviour: Behaviour) -> Score:  # noqa: ARG002  (the model says it all)
        def score(replies: Sequence[Reply]) -> np.ndarray:
            found = perplexities(loaded, replies)
            return ((found >= self.min) & (found <= self.max)).astype(float)

        return score


def perplexities(loaded: Loaded, replies: Sequence[Reply]) -> np.ndarray:
    """Perplexity of each reply's text given its prompt, [n]; infinite where there is no text."""
    result = np.full(len(replies), np.inf)
    said = [index for index, reply in enumerate(replies) if reply.text.strip()]
    encoded = [encode(loaded.tokenizer, Text(replies[index].prompt, replies[index].text)) for index in said]
    result[said] = np.exp(-mean_log_probabilities(loaded, encoded))
    return result


class Ended(ScorerBase):
    """1 if the model ended its turn by itself before the limit of new tokens.

    Wrong for a model that ends at once: an empty reply has ended too.
    """

    kind: Literal["ended"]

    def bind(self, loaded: Loaded, behaviour: Behaviour) -> Score:  # noqa: ARG002  (the reply says it all)
        return lambda replies: np.array([float(reply.ended) for reply in replies])

    def on_texts(self) -> str:
        return "whether a model ends its turn is not in the texts of the data"
