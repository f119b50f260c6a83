"""Continue prompts with whatever hooks are on: greedy or sampled, one seed, left-padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_steer.behaviour import Encoded, Text, encode
from compile_steer.models import Loaded


def continue_prompts(
    loaded: Loaded, prompts: Sequence[str], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[Encoded]:
    """Continue each prompt; returns prompt and continuation as tokens, cut after the end of the turn.

    Args:
        temperature: 0 is greedy; above 0 samples from the full distribution at that temperature.
    """
    tokenizer = loaded.tokenizer
    encoded = [encode(tokenizer, Text(prompt)) for prompt in prompts]
    width = max(len(one.ids) for one in encoded)
    input_ids = torch.full((len(encoded), width), int(tokenizer.pad_token_id), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, one in enumerate(encoded):
        input_ids[row, width - len(one.ids) :] = torch.tensor(one.ids)
        mask[row, width - len(one.ids) :] = 1
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=input_ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    ends = _end_tokens(loaded)
    return [
        Encoded((*one.ids, *_until_end(output[row, width:].tolist(), ends)), one.n_prompt)
        for row, one in enumerate(encoded)
    ]


def _end_tokens(loaded: Loaded) -> set[int]:
    end = loaded.model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {loaded.tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and with the first end-of-turn token."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def ended(loaded: Loaded, encoded: Encoded) -> bool:
    """True if the continuation closed its turn by itself."""
    return encoded.ids[-1] in _end_tokens(loaded) and len(encoded.ids) > encoded.n_prompt


def response_text(loaded: Loaded, encoded: Encoded) -> str:
    """The continuation as text, without special tokens."""
    return str(loaded.tokenizer.decode(list(encoded.ids[encoded.n_prompt :]), skip_special_tokens=True)).strip()
