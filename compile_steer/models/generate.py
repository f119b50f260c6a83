"""Continue prompts, steered or with whatever hooks are registered: greedy or sampled with a seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig

from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode, pad, require_room
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program


def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Text | Encoded],
    program: Program | Sequence[Program] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache: Cache | None = None,
) -> list[Encoded]:
    """Continue each prompt; returns prompt and continuation, cut after the end-of-turn token.

    Args:
        prompts: conversations; a response after the last prompt is ignored.
        program: steers the model: one program for all prompts, one per prompt, or None.
        temperature: 0 is greedy; above 0 samples from the full distribution at that temperature.
        cache: the result of `prefill` for the only prompt, under the same program; it is not changed.
    """
    texts = [prompt if isinstance(prompt, Encoded) else encode(loaded.tokenizer, prompt) for prompt in prompts]
    encoded = [replace(text, ids=text.ids[: text.n_prompt]) for text in texts]
    # Padded on the left, so that every prompt ends where generation begins.
    batch = pad(encoded, range(len(encoded)), loaded.pad_id, left=True).to(loaded.device)
    require_room(loaded, encoded, max_new_tokens)
    ends = _end_tokens(loaded)
    torch.manual_seed(seed)
    with neutral_generation(loaded, temperature), steered(loaded.model, program, roles=batch.roles), torch.no_grad():
        output = loaded.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            past_key_values=copy.deepcopy(cache),
        )
    continued = []
    for row, prompt in enumerate(encoded):
        new = output[row, batch.input_ids.shape[1] :].tolist()
        stop = next((index + 1 for index, token in enumerate(new) if token in ends), len(new))
        continued.append(replace(prompt, ids=(*prompt.ids, *new[:stop])))
    return continued


@contextmanager
def neutral_generation(loaded: LoadedModel, temperature: float = 0.0) -> Iterator[None]:
    """Generate by the model's distribution alone inside the block: greedy, or sampled from all of it at a `temperature`.

    A checkpoint brings settings for a chat (penalties, suppressed tokens, a minimum probability, beams, a kind of cache).
    transformers fills whatever a call leaves open from them, so they are taken away; of them only the tokens that end an
    answer are kept.
    """
    model: Any = loaded.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the one that generates
    own, ends = model.generation_config, sorted(_end_tokens(loaded))
    # By default transformers cuts the distribution to the 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=loaded.pad_id, **sampling)
    try:
        yield
    finally:
        model.generation_config = own


def prefill(loaded: LoadedModel, prompt: Encoded, program: Program | None = None) -> Cache:
    """Keys and values of a prompt of two or more tokens, without its last one: `generate` must have one token to read."""
    batch, end = pad([prompt], [0], loaded.pad_id).to(loaded.device), prompt.n_prompt - 1
    with steered(loaded.model, program, roles=batch.roles[:, :end]), torch.no_grad():
        output = loaded.layout.backbone(input_ids=batch.input_ids[:, :end], use_cache=True)
    return cast(Cache, output.past_key_values)


def states_after(loaded: LoadedModel, text: Encoded, cache: Cache, program: Program | None = None) -> Tensor:
    """Final hidden states [n, d_model] that predict the n tokens of a text's response, from `prefill` of its prompt."""
    batch = pad([text], [0], loaded.pad_id).to(loaded.device)
    rest = batch.input_ids[:, text.n_prompt - 1 :]
    with steered(loaded.model, program, roles=batch.roles), torch.no_grad():
        output = loaded.layout.backbone(input_ids=rest, past_key_values=copy.deepcopy(cache), use_cache=True)
    return cast(Tensor, output.last_hidden_state[0, :-1])


def _end_tokens(loaded: LoadedModel) -> set[int]:
    end = loaded.model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {loaded.tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}


def ended(loaded: LoadedModel, encoded: Encoded) -> bool:
    """True if the continuation ended with an end-of-turn token."""
    return encoded.ids[-1] in _end_tokens(loaded) and len(encoded.ids) > encoded.n_prompt


def response_text(loaded: LoadedModel, encoded: Encoded) -> str:
    """The continuation as text, without special tokens."""
    return str(loaded.tokenizer.decode(list(encoded.ids[encoded.n_prompt :]), skip_special_tokens=True)).strip()
