"""Score the same texts under many programs, paying once for what the programs have in common.

That is the blocks below the steered one, the tokens that several texts begin with (see `packing`), and the
vocabulary at every position that predicts no response. Programs of one shape run as rows of one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, token_logprobs
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from compile_steer.validate.packed_batch import Packed, pack

_BATCH_TOKENS = 4096


class SharedTexts:
    """Texts whose hidden states at the input of block `layer` are kept; `layer` only moves up.

    `token_blocks` counts the work: padded tokens times the blocks that they were run through.
    """

    def __init__(self, loaded: LoadedModel, encoded: Sequence[Encoded]) -> None:
        self._loaded = loaded
        self._n = len(encoded)
        packed = pack(loaded.layout, encoded, loaded.pad_id, loaded.model.dtype)
        self._packed = [one.to(loaded.device) for one in packed]
        self._hidden: list[Tensor | None] = [None] * len(packed)
        self._layer = 0
        self.token_blocks = 0

    def advance(self, layer: int) -> None:
        """Move the kept states up to the input of block `layer`; blocks below it are not run again."""
        if layer < self._layer:
            raise ValueError(f"the kept states are at block {self._layer}; they do not go back to {layer}")
        if layer > self._layer:
            self._hidden = [self._run(at, 1, stop=layer) for at in range(len(self._packed))]
            self._layer = layer

    def base(self) -> np.ndarray:
        """Mean log-probability of each response without steering, [n] in nats a token."""
        (found,) = self._scores([None])
        return np.asarray(found)

    def under(self, programs: Sequence[Program]) -> np.ndarray:
        """The same under each of `programs`, [n_programs, n]; none of them may act below the kept states."""
        for program in programs:
            if program.first_layer < self._layer:
                raise ValueError(f"the kept states at block {self._layer} are above {program.describe()}")
        if len({program.shape for program in programs}) == 1:
            return self._scores(programs)
        return np.concatenate([self._scores([program]) for program in programs])

    def divergence(self, program: Program) -> float:
        """KL(steered || base), the mean over the positions that predict the responses, in nats a token."""
        model, found = self._loaded.model, []
        for at, packed in enumerate(self._packed):
            base, under = (self._states(at, [one])[0][packed.nodes] for one in (None, program))
            found.append(divergence(model, under, model, base).kl)
        return float(torch.cat(found).mean())

    def _scores(self, programs: Sequence[Program | None]) -> np.ndarray:
        result = np.zeros((len(programs), self._n))
        for at, packed in enumerate(self._packed):
            width = max(1, _BATCH_TOKENS // packed.n_tokens)
            for start in range(0, len(programs), width):
                states = self._states(at, programs[start : start + width])
                for row, mine in enumerate(states, start):
                    means, texts = _response_means(self._loaded, packed, mine[packed.nodes])
                    result[row, texts] = means
        return result

    def _states(self, at: int, programs: Sequence[Program | None]) -> Tensor:
        """Final hidden states [n_programs, rows * time, d_model] of batch `at`."""
        packed, n = self._packed[at], len(programs)
        given = [program for program in programs if program is not None]
        roles = packed.roles.repeat(n, 1)
        # A program a row of the batch: each program's rows stand together.
        under = given[0] if len(given) == 1 else [one for one in given for _row in range(packed.roles.shape[0])]
        with steered(self._loaded.model, under or None, roles=roles):
            hidden = self._run(at, n)
        return hidden.reshape(n, packed.n_tokens, -1)

    def _run(self, at: int, copies: int, stop: int | None = None) -> Tensor:
        packed, kept = self._packed[at], self._hidden[at]
        end = self._loaded.layout.n_layers if stop is None else stop
        self.token_blocks += copies * packed.n_tokens * (end - self._layer)
        with torch.no_grad():
            return run_blocks(
                self._loaded.model,
                packed.input_ids.repeat(copies, 1),
                packed.attention_mask.repeat(copies, *[1] * (packed.attention_mask.ndim - 1)),
                position_ids=packed.position_ids.repeat(copies, 1),
                start=self._layer,
                stop=stop,
                hidden=None if kept is None else kept.repeat(copies, 1, 1),
            )


def _response_means(loaded: LoadedModel, packed: Packed, states: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(mean log-probability of each response [k], which texts they are [k]) from states [n_nodes, d_model]."""
    with torch.no_grad():
        found = token_logprobs(loaded.model, states, packed.targets, packed.which)
    texts, place, count = packed.texts.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(texts), device=found.device).index_add_(0, place, found)
    return (sums / count).cpu().numpy(), texts.cpu().numpy()
