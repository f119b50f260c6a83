"""Continue prompts, steered or with whatever hooks are registered: greedy or sampled with a seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from compile_steer.common import distributed
from compile_steer.common.errors import CompileSteerError, LayoutError, library_errors
from compile_steer.models.forward import code_of
from compile_steer.models.kept_passes import kept_or_made
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Batch, Encoded, encode, pad, require_room
from compile_steer.steering.blocks import token_ids
from compile_steer.steering.compare import distance, tolerance_of
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site


def continue_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Text | Encoded],
    program: Program | Sequence[Program] | None = None,
    *,
    max_new_tokens: int,
    temperature: float | Sequence[float] = 0.0,
    seed: int = 0,
) -> list[Encoded]:
    """Continue each prompt; returns prompt and continuation, cut after the end-of-turn token.

    Several processes continue their shares, with the random numbers that each prompt would have in one process.

    Args:
        prompts: conversations; a response after the last prompt is ignored.
        program: steers the model: one program for all prompts, one per prompt, or None.
        temperature: 0 is greedy; above 0 samples from the full distribution at that temperature. One for all prompts, or one
            per prompt.
    """
    texts = [prompt if isinstance(prompt, Encoded) else encode(loaded.tokenizer, prompt) for prompt in prompts]
    encoded = [replace(text, ids=text.ids[: text.n_prompt]) for text in texts]
    require_room(loaded, encoded, max_new_tokens)
    ends, traits = end_tokens(loaded), _traits(loaded)
    every = [temperature] * len(encoded) if isinstance(temperature, int | float) else temperature

    def continue_rows(own: list[int]) -> list[tuple[int, ...]]:
        # Padded on the left, so that every prompt ends where generation begins.
        batch = pad(encoded, own, loaded.pad_id, left=True).to(loaded.device)
        programs = program if program is None or isinstance(program, Program) else [program[row] for row in own]
        in_parts = distributed.count() > 1 or not traits.pads or len(set(every)) > 1
        draws = [_Draws(every, own)] if max(every) > 0 and in_parts else []
        torch.manual_seed(seed)
        with (
            neutral_generation(loaded, 0.0 if draws else every[0]),
            steered(loaded.model, programs, roles=batch.roles),
        ):
            output: Tensor = _generate(loaded, batch, traits.caches, max_new_tokens, logits_processor=draws)
        return [_until_end(new, ends) for new in output[:, batch.input_ids.shape[1] :].tolist()]

    def continue_share(own: list[int]) -> list[tuple[int, ...]]:
        groups: dict[int, list[int]] = {}
        for row in own:
            groups.setdefault(0 if traits.pads else len(encoded[row].ids), []).append(row)
        new = {row: tokens for rows in groups.values() for row, tokens in zip(rows, continue_rows(rows), strict=True)}
        return [new[row] for row in own]

    def write() -> tuple[Tensor, Tensor]:
        written = distributed.spread(range(len(encoded)), continue_share)
        counts = torch.tensor([len(new) for new in written])
        return torch.tensor([token for new in written for token in new]), counts

    tokens, counts = kept_or_made(
        loaded,
        encoded,
        program,
        write,
        of="answers",
        limit=max_new_tokens,
        temperature=every,
        seed=seed,
        ends=sorted(ends),
    )
    written = [new.tolist() for new in tokens.split(counts.tolist())]
    return [replace(text, ids=(*text.ids, *new)) for text, new in zip(encoded, written, strict=True)]


class _Draws(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Sampling of some rows of a batch, as `torch.multinomial` samples them when it is given all rows."""

    def __init__(self, temperatures: Sequence[float], own: Sequence[int]) -> None:
        self._n, self._own = len(temperatures), list(own)
        self._temperature = torch.tensor(temperatures)[self._own].unsqueeze(1)

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        """[rows, vocab] scores whose largest is at the token that is drawn; as they are where the temperature is 0."""
        noise = torch.empty(self._n, scores.shape[1], dtype=scores.dtype, device=scores.device).exponential_(1)
        temperature = self._temperature.to(scores)
        greedy = temperature == 0
        drawn = torch.softmax(scores / temperature.masked_fill(greedy, 1.0), dim=-1) / noise[self._own]
        return torch.where(greedy, scores, drawn)


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
        new_tokens, caches = min(step, limit - len(text.ids)), _traits(loaded).caches
        with neutral_generation(loaded), steered(loaded.model, program, roles=batch.roles):
            output = _generate(loaded, batch, caches, new_tokens, past_key_values=cache, return_dict_in_generate=True)
        cache = output.past_key_values if caches else None
        text = replace(text, ids=(*text.ids, *_until_end(output.sequences[0, len(text.ids) :].tolist(), ends)))
        yield text


def _until_end(tokens: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    """The tokens up to the first that ends an answer, with it."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def _generate(loaded: LoadedModel, batch: Batch, use_cache: bool, max_new_tokens: int, **options: Any) -> Any:
    with torch.no_grad():
        return loaded.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max_new_tokens,
            use_cache=use_cache,
            **options,
        )


@dataclass
class _Traits:
    """What a model's own code does right beside a plain pass: attention does both, what passes a state on may not.

    Attributes:
        pads: padding on the left changes nothing.
        caches: generating token by token from a cache gives what whole passes give.
    """

    pads: bool = False
    caches: bool = False


_TRAITS: dict[object, _Traits] = {}


def _traits(loaded: LoadedModel) -> _Traits:
    """Measured once for a code, on 6 tokens. Raises `LayoutError` where the model's own code cannot generate at all."""
    model = loaded.model
    if (code := code_of(model)) in _TRAITS:
        return _TRAITS[code]
    traits = _Traits()
    ids = tuple(token_ids(model)[0, :6].tolist())
    batch = pad([Encoded(ids[:3], 3), Encoded(ids, 6)], [0, 1], loaded.pad_id, left=True).to(loaded.device)
    # At the responses alone, so that it must be known which tokens those are; it changes nothing.
    idle = Program((Intervention(Site(0), "add", torch.zeros(loaded.layout.d_model), 1.0, "response"),), "", "")

    def same(new: Tensor, whole: Tensor) -> bool:
        return distance(new, whole) < tolerance_of(model.dtype)

    def plain(tokens: Tensor, **positions: Tensor) -> Tensor:
        inputs = tokens.unsqueeze(0)
        mask = torch.ones_like(inputs)
        return cast(Tensor, model(input_ids=inputs, attention_mask=mask, use_cache=False, **positions).logits[0, -1])

    name, failure = type(model).__name__, None
    if "position_ids" in inspect.signature(model.forward).parameters:
        row, counted = batch.input_ids[1], torch.arange(6, device=loaded.device).unsqueeze(0)
        with torch.no_grad(), library_errors(lambda reason: LayoutError(f"{name} cannot be run ({reason}).")):
            if not same(plain(row, position_ids=counted), plain(row)):
                raise LayoutError(
                    f"{name}: what it generates is not what its plain passes give, for it counts positions from another number "
                    "there, as some encoders do. Its answers would say nothing of the model that is measured and compiled."
                )
    for use_cache in (True, False):
        try:
            with library_errors(lambda reason: LayoutError(f"{name} cannot generate ({reason}).")), torch.no_grad():
                with neutral_generation(loaded), steered(model, idle, roles=batch.roles):
                    output = _generate(
                        loaded, batch, use_cache, 2, min_new_tokens=2, output_logits=True, return_dict_in_generate=True
                    )
                tokens, (first, second) = output.sequences, output.logits
                traits.pads = same(first[0], plain(tokens[0, 3:6]))
                traits.caches = use_cache and same(second[1], plain(tokens[1, :7]))
        except CompileSteerError as error:
            failure = error
            continue
        failure = None
        if traits.caches:
            break
    if failure is not None:
        raise failure
    _TRAITS[code] = traits
    return traits


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
