"""How much of a behaviour a text shows (0 to 1), and how much more likely the model finds it (nats)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from compile_steer.behaviour import Pair
from compile_steer.metrics import chunks, log_softmax
from compile_steer.models import Loaded
from compile_steer.replay import readout, run_span
from compile_steer.tokens import Batch, Encoded, Text, batches, encode


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keywords(_Strict):
    """1 if any of `patterns` (regular expressions, case ignored) occurs and none of `absent` does."""

    kind: Literal["keywords"]
    patterns: tuple[str, ...] = Field(min_length=1)
    absent: tuple[str, ...] = ()

    @field_validator("patterns", "absent")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return patterns

    def score(self, text: str) -> float:
        plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        found = any(re.search(p, plain, re.IGNORECASE) for p in self.patterns)
        spoiled = any(re.search(p, plain, re.IGNORECASE) for p in self.absent)
        return float(found and not spoiled)


class Lowercase(_Strict):
    """1 if the text has letters and none of them is upper case."""

    kind: Literal["lowercase"]

    def score(self, text: str) -> float:
        letters = [c for c in text if c.isalpha()]
        return float(bool(letters) and not any(c.isupper() for c in letters))


class Length(_Strict):
    """1 if the text has at least one and at most `max_words` words."""

    kind: Literal["length"]
    max_words: int = Field(gt=0)

    def score(self, text: str) -> float:
        return float(1 <= len(text.split()) <= self.max_words)


Scorer = Annotated[Keywords | Lowercase | Length, Field(discriminator="kind")]


def repetition(text: str) -> float:
    """Share of a text's word 3-grams that stood in it before (above .2 is broken); 0 for short texts."""
    words = text.lower().split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def encode_pairs(loaded: Loaded, pairs: Sequence[Pair]) -> list[Encoded]:
    """Both sides of each pair under the plain prompt: positives first, then negatives.

    The contrast asks what the model would rather *say* to the same prompt, so an instruction that a
    template adds for extraction is left out here.
    """
    sides = [Text(p.prompt, p.positive.response) for p in pairs] + [Text(p.prompt, p.negative.response) for p in pairs]
    return [encode(loaded.tokenizer, side) for side in sides]


def contrast_scores(log_probabilities: np.ndarray) -> np.ndarray:
    """[n] positive minus negative mean log-probability, from `mean_log_probabilities` of encoded pairs."""
    positive, negative = np.split(log_probabilities, 2)
    return np.asarray(positive - negative)


def mean_log_probabilities(
    loaded: Loaded, encoded: Sequence[Encoded], *, final: Callable[[Batch], torch.Tensor] | None = None
) -> np.ndarray:
    """Mean log-probability of each text's response tokens, [n] in nats a token.

    Args:
        final: gives a batch's final hidden states [batch, time, d_model]; by default the model is run
            whole. A sweep passes a function that starts from a shared prefix.
    """
    result = np.zeros(len(encoded))
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        with torch.no_grad():
            hidden = final(batch) if final else run_span(loaded.model, batch.input_ids, batch.attention_mask)
            result[list(batch.rows)] = _response_means(loaded, batch, hidden)
    return result


def _response_means(loaded: Loaded, batch: Batch, hidden: torch.Tensor) -> np.ndarray:
    chosen = batch.predicts_response
    targets = torch.roll(batch.input_ids, -1, dims=1)[chosen]
    states = hidden[chosen]
    found = torch.cat(
        [
            log_softmax(readout(loaded.model, states[part])).gather(1, targets[part].unsqueeze(1)).squeeze(1)
            for part in chunks(states.shape[0])
        ]
    )
    rows = chosen.nonzero()[:, 0]
    sums = torch.zeros(chosen.shape[0], device=found.device).index_add_(0, rows, found)
    means: np.ndarray = (sums / chosen.sum(dim=1).clamp(min=1)).cpu().numpy()
    return means
