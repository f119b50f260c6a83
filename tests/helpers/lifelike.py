"""Tiny models whose weights are like trained ones."""

from __future__ import annotations

import torch

from compile_steer.models.load import LoadedModel
from tests.helpers.tiny import BOS_ID, HIDDEN, build, revision, tokenizer


def lifelike(family: str) -> LoadedModel:
    """A tiny model with what trained weights have and random ones have not, tied.

    Norm weights log-normal with outliers from .01 to 100, a first token whose norm is a hundred times the others', some
    channels that carry more than the rest and move together, hidden units that are mostly on.
    """
    model = build(family, tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" in name:
                gains = torch.exp(0.7 * torch.randn(len(weight), generator=generator))
                if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                    gains = 3 * gains
                    gains[3], gains[11], gains[20] = 0.01, 0.05, 100.0
                weight.copy_(gains - 1 if family.startswith("gemma") else gains)
        table = model.get_input_embeddings().weight
        table += torch.randn(len(table), 2, generator=generator) @ torch.randn(2, HIDDEN, generator=generator)
        table[:, 5:8] *= 4
        table[BOS_ID] *= 100
    return LoadedModel(model, tokenizer(), f"lifelike-{family}", revision(family), "")
