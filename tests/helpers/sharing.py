"""Texts that share rows and batches, what each of them gives alone, and answers written token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compile_steer.models.generate import continue_prompts, end_tokens
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded, pad
from compile_steer.steering.hooks import RESPONSE, steered
from compile_steer.steering.program import Program
from tests.helpers.tiny import PAD_ID, VOCAB


def sharing_texts(template: int = 3, seed: int = 0, longest: int = 5) -> list[Encoded]:
    """Pairs on three prompts after a common template, one text that is the beginning of another, and two turns."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, VOCAB, (n,), generator=generator).tolist())

    opening = words(template)
    texts = []
    for n in (2, 4, 3):
        prompt = opening + words(n)
        texts += [Encoded(prompt + words(k), len(prompt)) for k in (longest, 2)]
    texts.append(Encoded(texts[0].ids[:-2], texts[0].n_prompt))
    # The same tokens as found[0], with other roles: the second turn of a conversation.
    turns = texts[0].ids + words(4)
    texts.append(Encoded(turns, len(texts[0].ids) + 2, ((texts[0].n_prompt, len(texts[0].ids)),)))
    return texts


def alone(model: LoadedModel, texts: Sequence[Encoded], under: Program | None) -> np.ndarray:
    """Each text by itself through the whole model, all logits."""
    means = []
    for text in texts:
        batch = pad([text], [0], PAD_ID)
        with torch.no_grad():
            if under is None:
                logits = model.model(batch.input_ids).logits
            else:
                with steered(model.model, under, roles=batch.roles):
                    logits = model.model(batch.input_ids).logits
        log_p = torch.log_softmax(logits[0], dim=-1)
        paths = [t for t, role in enumerate(text.roles) if role == RESPONSE]
        means.append(np.mean([float(log_p[t - 1, text.ids[t]]) for t in paths]))
    return np.array(means)


def answers(
    model: LoadedModel, texts: Sequence[Encoded], under: Program, count: int = 3
) -> tuple[list[Any], list[Any]]:
    """Greedy answers of up to `count` tokens to two prompts of unequal length: of one batch, and each token by a pass of its own
    through the whole model."""
    prompts, ends = [Encoded(texts[0].ids[:5], 5), Encoded(texts[2].ids[:7], 7)], end_tokens(model)
    together = continue_prompts(model, prompts, under, max_new_tokens=count)
    single = []
    for prompt in prompts:
        ids = list(prompt.ids)
        while len(ids) < prompt.n_prompt + count and (len(ids) == prompt.n_prompt or ids[-1] not in ends):
            roles = torch.tensor([Encoded(tuple(ids), prompt.n_prompt).roles])
            with steered(model.model, under, roles=roles), torch.no_grad():
                ids.append(int(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        single.append(tuple(ids))
    return [text.ids for text in together], single
