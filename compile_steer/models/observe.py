"""What a model computes on given texts, under a program or as it is: the measurements that judges share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import contrast_scores, mean_log_probabilities
from compile_steer.models.tokens import Batch, Encoded, batches
from compile_steer.steering.hooks import PAD, steered
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class States:
    """Final hidden states [n_tokens, d_model] at the positions that predict the response, and elsewhere.

    Both matter, and apart: a chat template's tokens are the same in every prompt, so they flatter a mean.
    `texts` [n_tokens] is the number of the text that each of the response's positions belongs to.
    """

    response: Tensor
    prompt: Tensor
    texts: Tensor


def _hooks(loaded: LoadedModel, program: Program | None, roles: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if program is None else steered(loaded.model, program, roles=roles)


def final_states(loaded: LoadedModel, encoded: Sequence[Encoded], program: Program | None = None) -> States:
    """Run the whole model, hooked with `program` if given, and keep the real tokens' final hidden states."""
    response, prompt, texts = [], [], []
    for batch in batches(encoded, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        with _hooks(loaded, program, batch.roles), torch.no_grad():
            final = run_blocks(loaded.model, batch.input_ids, batch.attention_mask)
        counts = batch.predicts_response
        response.append(final[counts])
        texts.append(torch.tensor(batch.rows)[counts.nonzero()[:, 0].cpu()])
        prompt.append(final[~counts & (batch.roles != PAD)])
    return States(torch.cat(response), torch.cat(prompt), torch.cat(texts))


def log_probabilities(loaded: LoadedModel, texts: Sequence[Encoded], program: Program | None = None) -> np.ndarray:
    """Mean log-probability of each of n texts' response tokens, [n] in nats a token, hooked with `program` if given."""

    def final(batch: Batch) -> Tensor:
        with _hooks(loaded, program, batch.roles):
            return run_blocks(loaded.model, batch.input_ids, batch.attention_mask)

    return mean_log_probabilities(loaded, texts, final=final)


def contrast(loaded: LoadedModel, pairs: Sequence[Encoded], program: Program | None = None) -> np.ndarray:
    """log p(positive) - log p(negative) of each of n encoded pairs, [n] in nats a token, hooked with `program` if given."""
    return contrast_scores(log_probabilities(loaded, pairs, program))
