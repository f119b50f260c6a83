"""What a model computes on a few given texts by its own forward: it tells files, processes and engines that compute alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from compile_steer.models.load import LoadedModel
from compile_steer.steering.layout import Layout

# Of several kinds.
REFERENCE_TEXTS = (
    "The quickest way from the harbour to the old town is along the river, past the market and the two bridges.",
    "What are you? I am a helpful assistant, and I can answer questions about many things.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([3, 5, 8, 13]))",
    "My sister has moved to another city, and I do not know how to tell her that I miss her.",
    "In 1869 a Russian chemist arranged the known elements in a table, and left gaps for those still to be found.",
    "To bake bread you need flour, water, salt and yeast; mix them, wait for an hour, knead, and wait again.",
    "He opened the letter twice before he believed it: the house by the sea was his.",
)
_TOKENS = 32  # the smallest models have few positions


def reference_tokens(loaded: LoadedModel) -> list[list[int]]:
    """The reference texts as token ids."""
    return [loaded.tokenizer(text)["input_ids"] for text in REFERENCE_TEXTS]


def reference_logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """Log-probability of every token but the first of each sequence, joined to [n], by transformers' own forward."""
    return np.concatenate([_own_logprobs(model, [ids])[0] for ids in sequences])


def _own_logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
    """The same, of each sequence; in one batch."""
    tokens = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True).to(Layout.of(model).device)
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in sequences], batch_first=True).to(tokens)
    values = []
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        for ids, row, predicted in zip(sequences, tokens, logits, strict=True):
            log_p = predicted[: len(ids) - 1].double().log_softmax(dim=-1)
            values.append(log_p.gather(1, row[1 : len(ids), None])[:, 0].cpu().numpy())
    return values


def fingerprints_apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference between two fingerprints of as many texts, in nats a token."""
    return float(np.abs(np.subtract(one, other)).max())


def fingerprint(model: Any, base: LoadedModel) -> list[float]:
    """Mean log-probability of each reference text under `model`, in nats a token, as the tokenizer of `base` splits it.

    Empty for a model in less than float32: its rounding would hide a difference.
    """
    if model.dtype != torch.float32:
        return []
    texts = [ids[:_TOKENS] for ids in reference_tokens(base) if len(ids) > 1]
    return [float(values.mean()) for values in _own_logprobs(model, texts)]
