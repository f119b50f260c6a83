"""Packed texts score as each text alone does, in every family, steered at every kind of position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compile_steer.common.errors import RecipeError
from compile_steer.models.forward import run_blocks
from compile_steer.models.logprobs import divergence
from compile_steer.models.packing import pack
from compile_steer.models.tokens import Encoded, pad
from compile_steer.steering.hooks import PROMPT, steered
from compile_steer.validation.evaluator import PrefixCache
from tests.helpers.sharing import alone, sharing_texts
from tests.helpers.tiny import FAMILIES, LAYERS, PAD_ID, build, intervention, loaded, program


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_score_as_each_text_alone(family: str) -> None:
    model, texts = loaded(family), sharing_texts()
    for positions in ("all", "response", "last_prompt", "prompt"):
        under = [program(family, intervention(layer=1, positions=positions, coefficient=c)) for c in (0.7, -1.6, 2.9)]
        cache = PrefixCache(model, texts)
        np.testing.assert_allclose(cache.mean_logprobs([None])[0], alone(model, texts, None), atol=1e-5)
        cache.advance(1)
        scores = cache.mean_logprobs(under)
        for row, single in zip(scores, under, strict=True):
            np.testing.assert_allclose(row, alone(model, texts, single), atol=2e-5)
        assert np.abs(scores[0] - scores[1]).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_programs_of_several_shapes_run_one_by_one(family: str) -> None:
    model, texts = loaded(family), sharing_texts(seed=1)
    under = [
        program(family, intervention("clamp", "mlp_out", k, coefficient=1.3), intervention("ablate", layer=2))
        for k in (1, 2)
    ]
    cache = PrefixCache(model, texts)
    cache.advance(1)
    expected = np.stack([alone(model, texts, single) for single in under])
    np.testing.assert_allclose(cache.mean_logprobs(under), expected, atol=2e-5)


def is_packed(family: str, texts: list[Encoded]) -> bool:
    """Packed rows have a mask of ancestors, [rows, 1, time, time]."""
    return pack(loaded(family), texts)[0].attention_mask.ndim == 4


def test_texts_longer_than_a_sliding_window_are_not_packed() -> None:
    short, long = sharing_texts(longest=2)[:2], sharing_texts()
    for family in FAMILIES:
        window = "gemma" in family or family == "gpt_oss"
        assert is_packed(family, long) is not window
    assert is_packed("llama", short)
    (batch,) = pack(loaded("gemma2"), long)
    assert batch.attention_mask.ndim == 2 and batch.input_ids.shape[0] == len(long)
    (batch,) = pack(loaded("llama"), long)
    assert batch.attention_mask.ndim == 4 and batch.roles.numel() < sum(len(text.ids) for text in long)
    assert int((batch.roles[0, :3] == PROMPT).sum()) == 3


def test_texts_within_a_sliding_window_are_packed() -> None:
    texts = [Encoded(text.ids[:6], 4) for text in sharing_texts(longest=3)[:4]]
    assert is_packed("gemma3_text", texts)
    under = program("gemma3_text", intervention(layer=2))
    cache = PrefixCache(loaded("gemma3_text"), texts)
    np.testing.assert_allclose(cache.mean_logprobs([under])[0], alone(loaded("gemma3_text"), texts, under), atol=2e-5)


def test_divergence_of_packed_texts_is_that_of_each_alone() -> None:
    model, texts = loaded("llama"), sharing_texts()[:4:2]  # prompts that share the template only
    under = program("llama", intervention(layer=2))
    parts = []
    for text in texts:
        batch = pad([text], [0], PAD_ID)
        states = []
        for single in (None, under):
            with torch.no_grad(), steered(model.model, single or under.scaled(0.0), roles=batch.roles):
                states.append(run_blocks(model.model, batch.input_ids, batch.attention_mask)[batch.predicts_response])
        parts.append(divergence(model.model, states[1], model.model, states[0]).kl)
    cache = PrefixCache(model, texts)
    cache.advance(LAYERS - 2)
    assert cache.divergence(under) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_cached_states_do_not_go_back() -> None:
    cache = PrefixCache(loaded("llama"), sharing_texts())
    cache.advance(2)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.advance(1)
    with pytest.raises(ValueError, match="are above"):
        cache.mean_logprobs([program("llama", intervention(layer=1))])


def test_long_texts_and_a_single_one_have_rows_of_their_own_without_a_square_mask() -> None:
    model = loaded("llama")
    short, long = Encoded(tuple(range(8, 20)), 4), Encoded(tuple(8 + n % 60 for n in range(700)), 650)
    model = replace(model, model=build("llama", max_position_embeddings=1024))
    batches = pack(model, [short, long, replace(short, n_prompt=5)])
    assert sorted(batch.attention_mask.ndim for batch in batches) == [2, 4]
    assert [sorted(batch.paths) for batch in batches] == [[0, 2], [1]]
    assert pack(model, [short])[0].attention_mask.ndim == 2 and pack(model, []) == []
    with pytest.raises(RecipeError, match="1100 tokens do not fit"):
        pack(model, [Encoded((8,) * 1100, 3)])


def test_a_text_that_is_longer_than_a_chunk_of_attention_shares_no_row() -> None:
    model = replace(loaded("llama"), model=build("llama"))
    model.model.config.attention_chunk_size = 6
    together, alone = pack(model, [Encoded(tuple(range(8, 8 + length)), 3) for length in (5, 6, 7)])
    assert sorted(together.paths) == [0, 1] and sorted(alone.paths) == [2]
