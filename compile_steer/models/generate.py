"""Continue prompts, steered or with whatever hooks are registered: greedy or sampled with a seed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor

from compile_steer.common import distributed
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

    Several processes continue their shares, with the random numbers that each prompt would have in one process.

    Args:
        prompts: conversations; a response after the last prompt is ignored.
        program: steers the model: one program for all prompts, one per prompt, or None.
        temperature: 0 is greedy; above 0 samples from the full distribution at that temperature.
        cache: the result of `prefill` for the only prompt, under the same program; it is not changed.
    """
    texts = [prompt if isinstance(prompt, Encoded) else encode(loaded.tokenizer, prompt) for prompt in prompts]
    encoded = [replace(text, ids=text.ids[: text.n_prompt]) for text in texts]
    require_room(loaded, encoded, max_new_tokens)
    ends = end_tokens(loaded)

    def continue_share(own: list[int]) -> list[tuple[int, ...]]:
        # Padded on the left, so that every prompt ends where generation begins.
        batch = pad(encoded, own, loaded.pad_id, left=True).to(loaded.device)
        programs = program if program is None or isinstance(program, Program) else [program[row] for row in own]
        draws = [_Draws(len(encoded), own, temperature)] if temperature > 0 and distributed.count() > 1 else []
        torch.manual_seed(seed)
        with (
            neutral_generation(loaded, 0.0 if draws else temperature),
            steered(loaded.model, programs, roles=batch.roles),
            torch.no_grad(),
        ):
            output: Tensor = loaded.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                past_key_values=copy.deepcopy(cache),
                logits_processor=draws,
            )
        continued = []
        for new in output[:, batch.input_ids.shape[1] :].tolist():
            stop = next((index + 1 for index, token in enumerate(new) if token in ends), len(new))
            continued.append(tuple(new[:stop]))
        return continued

    written = distributed.spread(range(len(encoded)), continue_share)
    return [replace(text, ids=(*text.ids, *new)) for text, new in zip(encoded, written, strict=True)]


class _Draws(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Sampling of some rows of a batch, as `torch.multinomial` samples them when it is given all rows."""

    def __init__(self, n: int, own: Sequence[int], temperature: float) -> None:
        self._n, self._own, self._temperature = n, list(own), temperature

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, vocab] scores whose largest is at the token that is drawn."""
        noise = torch.empty(self._n, scores.shape[1], dtype=scores.dtype, device=scores.device).exponential_(1)
        return torch.softmax(scores / self._temperature, dim=-1) / noise[self._own]


def stream_answer(
    loaded: LoadedModel, prompt: Encoded, program: Program | None = None, *, max_new_tokens: int, step: int = 4
) -> Iterator[Encoded]:
    """Yield the greedy continuation of one prompt after every `step` tokens; the last is what `continue_prompts` returns.

    Hooks are on only while a step is computed, so that other models may answer in turn.
    """
    text, ends, cache = replace(prompt, ids=prompt.ids[: prompt.n_prompt]), end_tokens(loaded), None
    require_room(loaded, [text], max_new_tokens)
    limit = prompt.n_prompt + max_new_tokens
    while len(text.ids) < limit and not ended(loaded, text):
        batch = pad([text], [0], loaded.pad_id).to(loaded.device)
        with neutral_generation(loaded), steered(loaded.model, program, roles=batch.roles), torch.no_grad():
            output = loaded.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=min(step, limit - len(text.ids)),
                past_key_values=cache,
                return_dict_in_generate=True,
            )
        cache = output.past_key_values
        new = output.sequences[0, len(text.ids) :].tolist()
        stop = next((index + 1 for index, token in enumerate(new) if token in ends), len(new))
        text = replace(text, ids=(*text.ids, *new[:stop]))
        yield text


@contextmanager
def neutral_generation(loaded: LoadedModel, temperature: float = 0.0) -> Iterator[None]:
    """Generate by the model's distribution alone inside the block: greedy, or sampled from all of it at a `temperature`.

    A checkpoint brings settings for a chat (penalties, suppressed tokens, a minimum probability, beams, a kind of cache).
    transformers fills whatever a call leaves open from them, so they are taken away; of them only the tokens that end an
    answer are kept.
    """
    model: Any = loaded.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT wraps the one that generates
    own, ends = model.generation_config, sorted(end_tokens(loaded))
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


def end_tokens(loaded: LoadedModel) -> set[int]:
    """The tokens that end an answer."""
    end = loaded.model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end]) | {loaded.tokenizer.eos_token_id}
    return {int(token) for token in ends if token is not None}


def ended(loaded: LoadedModel, encoded: Encoded) -> bool:
    """True if the continuation ended with an end-of-turn token."""
    return encoded.ids[-1] in end_tokens(loaded) and len(encoded.ids) > encoded.n_prompt


def response_text(loaded: LoadedModel, encoded: Encoded) -> str:
    """The continuation as text, without special tokens."""
    return str(loaded.tokenizer.decode(list(encoded.ids[encoded.n_prompt :]), skip_special_tokens=True)).strip()
