"""Continue prompts, steered or with whatever hooks are on: greedy or sampled, one seed, left-padded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.steering.hooks import PAD, steered
from compile_steer.steering.program import Program


def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Text],
    program: Program | Sequence[Program] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Encoded]:
    """Continue conversations up to the response; a response that is there is left out. See `continue_encoded`."""
    encoded = [encode(loaded.tokenizer, replace(prompt, response="")) for prompt in prompts]
    return continue_encoded(loaded, encoded, program, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def continue_encoded(
    loaded: LoadedModel,
    texts: Sequence[Encoded],
    program: Program | Sequence[Program] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    cache: Cache | None = None,
) -> list[Encoded]:
    """Continue each text's prompt; returns prompt and continuation as tokens, cut after the end of the turn.

    Args:
        texts: what stands after a prompt is left out.
        program: what steers the model meanwhile: one for all, one a prompt, or None.
        temperature: 0 is greedy; above 0 samples from the full distribution at that temperature.
        cache: what `prefill` found of the one text under the same program; left as it was.
    """
    encoded = [replace(text, ids=text.ids[: text.n_prompt]) for text in texts]
    pad_id = int(loaded.tokenizer.pad_token_id)
    width = max(len(one.ids) for one in encoded)
    input_ids = torch.full((len(encoded), width), pad_id, dtype=torch.long)
    roles = torch.full((len(encoded), width), PAD, dtype=torch.int8)
    for row, one in enumerate(encoded):
        input_ids[row, width - len(one.ids) :] = torch.tensor(one.ids)
        roles[row, width - len(one.ids) :] = torch.tensor(one.roles, dtype=torch.int8)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    hooks = nullcontext() if program is None else steered(loaded.model, program, roles=roles.to(loaded.device))
    torch.manual_seed(seed)
    with hooks, torch.no_grad():
        output = loaded.model.generate(
            input_ids=input_ids.to(loaded.device),
            attention_mask=(roles != PAD).long().to(loaded.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            **({} if cache is None else {"past_key_values": copy.deepcopy(cache)}),
            **sampling,
        )
    ends = _end_tokens(loaded)
    return [
        replace(one, ids=(*one.ids, *_until_end(output[row, width:].tolist(), ends))) for row, one in enumerate(encoded)
    ]


def prefill(loaded: LoadedModel, prompt: Encoded, program: Program | None = None) -> Cache:
    """Keys and values of a prompt but its last token, so of two or more: of a long one, for all that is asked after it."""
    ids, roles = _row(loaded, prompt, prompt.n_prompt - 1)
    hooks = nullcontext() if program is None else steered(loaded.model, program, roles=roles)
    with hooks, torch.no_grad():
        found: Cache = loaded.layout.backbone(input_ids=ids, use_cache=True).past_key_values
    return found


def states_after(loaded: LoadedModel, text: Encoded, cache: Cache, program: Program | None = None) -> Tensor:
    """Final hidden states [n, d_model] that predict the n tokens of a text's response, from `prefill` of its prompt."""
    ids, roles = _row(loaded, text, len(text.ids))
    hooks = nullcontext() if program is None else steered(loaded.model, program, roles=roles)
    rest = ids[:, text.n_prompt - 1 :]
    with hooks, torch.no_grad():
        found = loaded.layout.backbone(input_ids=rest, past_key_values=copy.deepcopy(cache), use_cache=True)
    states: Tensor = found.last_hidden_state[0, :-1]
    return states


def _row(loaded: LoadedModel, text: Encoded, stop: int) -> tuple[Tensor, Tensor]:
    """The first `stop` ids and their roles, [1, stop]."""
    ids = torch.tensor([text.ids[:stop]], device=loaded.device)
    return ids, torch.tensor([text.roles[:stop]], dtype=torch.int8, device=loaded.device)


def _end_tokens(loaded: LoadedModel) -> set[int]:
    end = loaded.model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {loaded.tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and with the first end-of-turn token."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def ended(loaded: LoadedModel, encoded: Encoded) -> bool:
    """True if the continuation closed its turn by itself."""
    return encoded.ids[-1] in _end_tokens(loaded) and len(encoded.ids) > encoded.n_prompt


def response_text(loaded: LoadedModel, encoded: Encoded) -> str:
    """The continuation as text, without special tokens."""
    return str(loaded.tokenizer.decode(list(encoded.ids[encoded.n_prompt :]), skip_special_tokens=True)).strip()
