"""What a model computes of a few fixed texts: by these it is known again in another process, file or engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compile_steer.models.load import LoadedModel

TEXTS = (
    "The quickest way from the harbour to the old town is along the river, past the market and the two bridges.",
    "What are you? I am a helpful assistant, and I can answer questions about many things.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([3, 5, 8, 13]))",
    "My sister has moved to another city, and I do not know how to tell her that I miss her.",
    "In 1869 a Russian chemist arranged the known elements in a table, and left gaps for those still to be found.",
    "To bake bread you need flour, water, salt and yeast; mix them, wait for an hour, knead, and wait again.",
    "He opened the letter twice before he believed it: the house by the sea was his.",
)
_LONGEST = 32  # tokens of a text that a fingerprint reads: the smallest models have few positions


def texts(loaded: LoadedModel) -> list[list[int]]:
    """The fixed texts as tokens."""
    return [loaded.tokenizer(text)["input_ids"] for text in TEXTS]


def log_probs(model: Any, sequences: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """log p of every token but the first of each sequence, [n], in nats, under transformers."""
    found = []
    for ids in sequences:
        tokens = torch.tensor([list(ids)], device=model.device)
        with torch.no_grad():
            values = model(input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(dim=-1)
        found.append(values.gather(1, tokens[0, 1:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)


def fingerprint(model: Any, base: LoadedModel) -> list[float]:
    """Mean log p of each fixed text, nats a token, under `model`, as the tokenizer of `base` splits it; none where the model
    computes in less than fp32, whose rounding would hide what differs."""
    if model.dtype != torch.float32:
        return []
    return [float(log_probs(model, [ids[:_LONGEST]]).mean()) for ids in texts(base) if len(ids) > 1]
