"""Continuing prompts: in batches of any lengths, under hooks, and up to the end of the turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from compile_steer.models.generate import (
    continue_prompts,
    ended,
    response_text,
)
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode, pad
from compile_steer.steering.hooks import steered
from tests.helpers.tiny import EOS_ID, build, chat_tokenizer, intervention, loaded, program

PROMPTS = (Text("w20 w21 w22 w23 w24"), Text("w30"), Text("w40 w41 w42"))


def unending(family: str) -> LoadedModel:
    """A model of its own without an end-of-turn token in its settings."""
    model = build(family)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return replace(loaded(family), model=model)


def greedy_by_hand(one: LoadedModel, prompt: Text, steps: int) -> tuple[int, ...]:
    ids = list(encode(one.tokenizer, prompt).ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(one.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids)


def test_a_batch_of_prompts_is_continued_as_each_alone() -> None:
    for family in ("llama", "gpt2", "gemma2"):
        one = unending(family)
        completions = continue_prompts(one, PROMPTS, max_new_tokens=6)
        assert [e.n_prompt for e in completions] == [5, 1, 3]
        for prompt, encoded in zip(PROMPTS, completions, strict=True):
            expected = greedy_by_hand(one, prompt, 6)
            cut = expected.index(EOS_ID) + 1 if EOS_ID in expected else len(expected)
            assert encoded.ids == expected[:cut]


def test_hooks_that_are_on_act_on_the_continuation() -> None:
    one = unending("llama")
    steering = program("llama", intervention(positions="last_prompt+response", coefficient=6.0))
    with steered(one.model, steering):
        completions = continue_prompts(one, PROMPTS, max_new_tokens=6)
    alone = [continue_prompts(one, [prompt], steering, max_new_tokens=6)[0] for prompt in PROMPTS]
    assert completions == alone
    assert completions != continue_prompts(one, PROMPTS, max_new_tokens=6)


def test_sampling_depends_on_the_given_seed_alone() -> None:
    one = unending("llama")

    def sample(seed: int) -> list[Encoded]:
        return continue_prompts(one, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    first, other = sample(3), sample(4)
    torch.manual_seed(99)
    assert sample(3) == first
    assert other != first
    assert first != continue_prompts(one, PROMPTS, max_new_tokens=8)


def test_each_prompt_may_have_its_own_temperature() -> None:
    one = unending("llama")
    greedy = continue_prompts(one, PROMPTS, max_new_tokens=8)

    def both(temperature: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
        each = [0.0] * len(PROMPTS) + [temperature] * len(PROMPTS)
        written = continue_prompts(one, [*PROMPTS, *PROMPTS], max_new_tokens=8, temperature=each, seed=seed)
        return written[: len(PROMPTS)], written[len(PROMPTS) :]

    samples = [both(1.0, seed) for seed in (3, 3, 4)]
    assert all(first == greedy for first, _drawn in samples)
    first, again, other = (drawn for _first, drawn in samples)
    assert first == again and other != first != greedy
    assert both(1e-6, 3)[1] == greedy, "next to 0 it is greedy too"


AMBIENT: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 5.0, "encoder_repetition_penalty": 3.0, "length_penalty": 4.0},
    "cuts": {
        "top_k": 1,
        "top_p": 0.01,
        "min_p": 0.9,
        "typical_p": 0.1,
        "epsilon_cutoff": 0.5,
        "eta_cutoff": 0.5,
        "top_h": 0.1,
    },
    "suppressed": {"suppress_tokens": list(range(6, 90)), "begin_suppress_tokens": list(range(6, 90))},
    "bad words": {"bad_words_ids": [[n] for n in range(6, 90)], "no_repeat_ngram_size": 1},
    "bias": {"sequence_bias": [[[11], 50.0]], "guidance_scale": 3.0},
    "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 9, "exponential_decay_length_penalty": (1, 5.0)},
    "lengths": {"max_length": 3, "max_new_tokens": 2, "min_length": 60, "min_new_tokens": 30, "max_time": 0.0},
    "beams": {"num_beams": 3, "early_stopping": True},
    "sequences": {"num_return_sequences": 2, "do_sample": True, "temperature": 9.0},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "speculation": {"prompt_lookup_num_tokens": 3},
    "strings": {"stop_strings": ["w"], "token_healing": True, "watermarking_config": {"bias": 9.0}},
}


@pytest.mark.parametrize("name", AMBIENT)
def test_no_setting_of_a_checkpoint_acts_on_what_is_generated(name: str) -> None:
    """Also custom entries of a configuration would be carried over by transformers."""
    one = unending("llama")
    expected = [continue_prompts(one, PROMPTS, max_new_tokens=6, temperature=t) for t in (0.0, 1.0)]
    settings = GenerationConfig(eos_token_id=None)
    for key, value in AMBIENT[name].items():
        setattr(settings, key, value)
    one.model.generation_config = settings
    assert [continue_prompts(one, PROMPTS, max_new_tokens=6, temperature=t) for t in (0.0, 1.0)] == expected
    assert one.model.generation_config is settings
    assert len({e.ids for e in continue_prompts(one, PROMPTS * 4, max_new_tokens=4, temperature=1.0)}) > len(PROMPTS)


def test_settings_of_the_base_do_not_act_under_an_adapter_either() -> None:
    one = unending("llama")
    wrapped = get_peft_model(one.model, LoraConfig(r=2, target_modules=["down_proj"]))
    adapted = replace(one, model=wrapped)
    expected = continue_prompts(adapted, PROMPTS, max_new_tokens=6)
    settings = GenerationConfig(suppress_tokens=list(range(6, 90)), repetition_penalty=5.0)
    wrapped.get_base_model().generation_config = settings
    assert continue_prompts(adapted, PROMPTS, max_new_tokens=6) == expected
    assert wrapped.get_base_model().generation_config is settings


@pytest.mark.parametrize("change", [{"use_cache": False}, {"output_hidden_states": True}, {"output_attentions": False}])
def test_settings_of_the_configuration_do_not_act_either(change: dict[str, Any]) -> None:
    one = unending("llama")
    expected = continue_prompts(one, PROMPTS, max_new_tokens=4)
    for key, value in change.items():
        setattr(one.model.config, key, value)
    assert continue_prompts(one, PROMPTS, max_new_tokens=4) == expected


def test_a_continuation_ends_with_its_first_end_of_turn() -> None:
    one = unending("llama")
    assert one.model.generation_config is not None

    def sample() -> list[Encoded]:
        return continue_prompts(one, PROMPTS, max_new_tokens=6, temperature=1.0, seed=0)

    whole = sample()
    assert not any(ended(one, encoded) for encoded in whole)
    first = whole[0].ids[5:]
    at = next(n for n in range(2, 6) if first[n] not in first[:n])
    stop = first[at]
    one.model.generation_config.eos_token_id = [stop, EOS_ID]
    completions = sample()
    for before, after in zip(whole, completions, strict=True):
        new = before.ids[before.n_prompt :]
        expected = new[: new.index(stop) + 1] if stop in new else new
        assert after.ids[after.n_prompt :] == expected
        assert ended(one, after) == (stop in new)
    assert len(completions[0].ids) == 5 + at + 1
    assert len({len(e.ids) - e.n_prompt for e in completions}) > 1


def test_a_prompt_that_ends_like_a_turn_has_not_ended_one() -> None:
    one = loaded("llama")
    assert not ended(one, Encoded((7, EOS_ID), 2))
    assert ended(one, Encoded((7, EOS_ID), 1))


def test_the_response_is_text_without_special_tokens() -> None:
    assert response_text(loaded("llama"), Encoded((20, 30, 31, EOS_ID), 1)) == "w30 w31"


@pytest.mark.parametrize("positions", ["prompt", "response", "last_prompt"])
def test_earlier_turns_are_responses_while_the_last_is_answered(positions: str) -> None:
    """Generation under hooks is greedy decoding by whole passes with the conversation's explicit roles."""
    one = replace(unending("llama"), tokenizer=chat_tokenizer())
    steering = program("llama", intervention(positions=positions, coefficient=6.0))
    talks = [
        Text("w20 w21", history=(("w30", "w31 w32 w33"), ("w34 w35", "w36"))),
        Text("w40 w41 w42 w43"),
    ]
    completions = continue_prompts(one, talks, steering, max_new_tokens=5)
    for talk, completion in zip(talks, completions, strict=True):
        encoded = encode(one.tokenizer, talk)
        assert (completion.n_prompt, completion.earlier) == (encoded.n_prompt, encoded.earlier)
        for _ in range(5):
            batch = pad([encoded], [0], 0)
            with steered(one.model, steering, roles=batch.roles), torch.no_grad():
                token = int(one.model(input_ids=batch.input_ids).logits[0, -1].argmax())
            encoded = replace(encoded, ids=(*encoded.ids, token))
        assert completion.ids == encoded.ids[: len(completion.ids)]
        assert len(completion.ids) == len(encoded.ids) or completion.ids[-1] == EOS_ID
