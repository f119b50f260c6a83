"""Pairs and neutral texts with what the base says of them: what every cell, control and dose is measured on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import encode_pairs, margins
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode
from compile_steer.steering.program import Program
from compile_steer.validate.prefix_cache import SharedTexts


class Bench:
    """The base's scores are read once; `advance` then saves the blocks that no program touches."""

    def __init__(self, loaded: LoadedModel, pairs: Sequence[Pair], neutral: Sequence[Text] = ()) -> None:
        self._pairs = SharedTexts(loaded, encode_pairs(loaded, pairs))
        self._neutral = SharedTexts(loaded, [encode(loaded.tokenizer, text) for text in neutral]) if neutral else None
        self.base_contrast = margins(self._pairs.base())
        self._base_neutral = self._neutral.base() if self._neutral else np.zeros(0)

    def advance(self, program: Program) -> None:
        """Every program from here on acts no lower than `program`."""
        for texts in (self._pairs, self._neutral):
            if texts is not None:
                texts.advance(program.first_layer)

    def effects(self, programs: Sequence[Program]) -> np.ndarray:
        """[n_programs, n_pairs] change of log p(positive) - log p(negative), nats a token."""
        under = self._pairs.under(programs) if programs else np.zeros((0, 2 * len(self.base_contrast)))
        steered = np.array([margins(row) for row in under]).reshape(len(programs), len(self.base_contrast))
        return np.asarray(steered - self.base_contrast)

    def perplexity_ratio(self, program: Program) -> float:
        """Neutral perplexity under `program` over the base's, as the geometric mean over texts."""
        return float(np.exp((self._base_neutral - self._given_neutral.under([program])[0]).mean()))

    def divergence(self, program: Program) -> float:
        """KL(steered || base) on neutral responses, nats a token."""
        return self._given_neutral.divergence(program)

    @property
    def token_blocks(self) -> int:
        """The work so far: padded tokens times blocks."""
        return self._pairs.token_blocks + (self._neutral.token_blocks if self._neutral else 0)

    @property
    def _given_neutral(self) -> SharedTexts:
        if self._neutral is None:
            raise ValueError("no neutral texts were given")
        return self._neutral
