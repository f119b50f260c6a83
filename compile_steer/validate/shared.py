"""Score the same texts under many programs, paying for the blocks below the steered one once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compile_steer.contrast import mean_log_probabilities
from compile_steer.hooks import steered
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.replay import run_span
from compile_steer.tokens import Batch, Encoded, batches


class SharedPrefix:
    """Texts whose hidden states at the input of block `layer` are kept; `layer` only moves up."""

    def __init__(self, loaded: Loaded, encoded: Sequence[Encoded]) -> None:
        self._loaded = loaded
        self._encoded = encoded
        self._hidden: dict[tuple[int, ...], Tensor] = {}
        self._layer = 0

    def advance(self, layer: int) -> None:
        """Move the kept states up to the input of block `layer`."""
        if layer == self._layer:
            return
        for batch in batches(self._encoded, int(self._loaded.tokenizer.pad_token_id)):
            with torch.no_grad():
                self._hidden[batch.rows] = self._run(batch.to(self._loaded.device), stop=layer)
        self._layer = layer

    def base(self) -> np.ndarray:
        """Mean log-probability of each response without steering, [n] in nats a token."""
        return mean_log_probabilities(self._loaded, self._encoded, final=self._run)

    def under(self, program: Program) -> np.ndarray:
        """The same under `program`, which must not act below the kept states."""
        if program.first_layer < self._layer:
            raise ValueError(f"the kept states at block {self._layer} are above {program.describe()}")

        def final(batch: Batch) -> Tensor:
            with steered(self._loaded.model, program, roles=batch.roles):
                return self._run(batch)

        return mean_log_probabilities(self._loaded, self._encoded, final=final)

    def _run(self, batch: Batch, stop: int | None = None) -> Tensor:
        return run_span(
            self._loaded.model,
            batch.input_ids,
            batch.attention_mask,
            start=self._layer,
            stop=stop,
            hidden=self._hidden.get(batch.rows),
        )
