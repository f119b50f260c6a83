"""How much more likely the model finds what shows a behaviour (nats a token)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from compile_steer.models.divergence import chunks, token_log_probabilities
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Batch, Encoded, batches, encode


def encode_pairs(loaded: LoadedModel, pairs: Sequence[Pair]) -> list[Encoded]:
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
    loaded: LoadedModel, encoded: Sequence[Encoded], *, final: Callable[[Batch], torch.Tensor] | None = None
) -> np.ndarray:
    """Mean log-probability of each text's response tokens, [n] in nats a token.

    Args:
        final: gives a batch's final hidden states [batch, time, d_model]; by default the model is run
            whole, as it is (see `observe.log_probabilities` for it under a program).
    """
    result = np.zeros(len(encoded))
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        with torch.no_grad():
            hidden = final(batch) if final else run_blocks(loaded.model, batch.input_ids, batch.attention_mask)
            result[list(batch.rows)] = _response_means(loaded, batch, hidden)
    return result


def _response_means(loaded: LoadedModel, batch: Batch, hidden: torch.Tensor) -> np.ndarray:
    chosen = batch.predicts_response
    targets = torch.roll(batch.input_ids, -1, dims=1)[chosen]
    states = hidden[chosen]
    parts = chunks(states.shape[0])
    found = torch.cat([token_log_probabilities(loaded.model, states[part], targets[part]) for part in parts])
    rows = chosen.nonzero()[:, 0]
    sums = torch.zeros(chosen.shape[0], device=found.device).index_add_(0, rows, found)
    means: np.ndarray = (sums / chosen.sum(dim=1).clamp(min=1)).cpu().numpy()
    return means
