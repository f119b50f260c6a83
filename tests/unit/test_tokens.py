"""Text becomes tokens with roles, and tokens become padded batches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from compile_steer.common.errors import RecipeError
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, batches, encode, pad, prompt_text
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE
from tests.helpers.tiny import BOS_ID, PAD_ID, chat_tokenizer, loaded, texts, tokenizer


def test_a_prompt_has_the_same_tokens_whatever_the_response() -> None:
    for tokens in (tokenizer(), chat_tokenizer()):
        responses = ("", "w7", "w8 w9", " w9")
        encoded = [encode(tokens, Text("w20 w21", response)) for response in responses]
        assert len({e.n_prompt for e in encoded}) == 1
        prompt = encoded[0].ids
        assert all(e.ids[: len(prompt)] == prompt for e in encoded)
        assert [len(e.ids) - len(prompt) for e in encoded] == [0, 1, 2, 1]


def test_a_chat_template_is_part_of_the_prompt_and_adds_no_token_twice() -> None:
    assert prompt_text(chat_tokenizer(), Text("w20")) == "<s> user w20 <s> assistant "
    encoded = encode(chat_tokenizer(), Text("w20", "w30"))
    assert encoded == Encoded((BOS_ID, 4, 20, BOS_ID, 5, 30), 5)
    assert encode(tokenizer(), Text("w20", "w30")) == Encoded((20, 30), 1)


def test_earlier_turns_of_the_assistant_are_responses() -> None:
    talk = Text("w20", "w21 w22", history=(("w30", "w31 w32 w33"), ("w34 w35", "w36")))
    encoded = encode(chat_tokenizer(), talk)
    words = [chat_tokenizer().convert_ids_to_tokens(token) for token in encoded.ids]
    roles = dict(zip(range(len(words)), encoded.roles, strict=True))
    assert [words[n] for n, role in roles.items() if role == RESPONSE] == ["w31", "w32", "w33", "w36", "w21", "w22"]
    assert [words[n] for n, role in roles.items() if role == LAST_PROMPT] == ["assistant"] * 3
    assert [words[start:stop] for start, stop in encoded.earlier] == [["w31", "w32", "w33"], ["w36"]]
    batch = pad([encoded, encode(chat_tokenizer(), Text("w20"))], (0, 1), PAD_ID)
    assert batch.roles[0].tolist() == encoded.roles
    following = [words[n + 1] for n in batch.predicts_response[0].nonzero()[:, 0].tolist()]
    assert following == ["w31", "w32", "w33", "w36", "w21", "w22"]


def test_turns_whose_positions_are_unknown_are_refused() -> None:
    talk = Text("w20", history=(("w30", "w31"),))
    with pytest.raises(RecipeError, match="needs a model with a chat template"):
        encode(tokenizer(), talk)
    forgetful = chat_tokenizer()
    forgetful.chat_template = "<s> {{ messages | length }} {{ messages[-1]['content'] }} assistant"
    with pytest.raises(RecipeError, match="rewrites earlier turns"):
        encode(forgetful, talk)


def test_a_padded_batch_has_the_role_of_each_token() -> None:
    rows = [Encoded((7, 8, 9), 2), Encoded((6,), 1), Encoded((5, 6, 7, 8), 1)]
    batch = pad(rows, (2, 0, 1), PAD_ID)
    assert batch.rows == (2, 0, 1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [7, 8, 9, PAD_ID], [6, PAD_ID, PAD_ID, PAD_ID]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch.roles.tolist() == [
        [LAST_PROMPT, RESPONSE, RESPONSE, RESPONSE],
        [PROMPT, LAST_PROMPT, RESPONSE, PAD],
        [LAST_PROMPT, PAD, PAD, PAD],
    ]
    assert batch.predicts_response.tolist() == [
        [True, True, True, False],
        [False, True, False, False],
        [False, False, False, False],
    ]


def test_a_pad_token_inside_a_text_is_not_padding() -> None:
    batch = pad([Encoded((7, PAD_ID, 9), 2)], (0,), PAD_ID)
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert batch.roles.tolist() == [[PROMPT, LAST_PROMPT, RESPONSE]]


@pytest.mark.parametrize("max_tokens", [1, 20, 47, 10_000])
def test_batches_hold_every_text_once_and_at_most_max_tokens(max_tokens: int) -> None:
    rows = texts([(1 + n % 4, n % 9) for n in range(23)])
    seen: list[int] = []
    for batch in batches(loaded("llama"), rows, max_tokens=max_tokens):
        seen += batch.rows
        assert batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1
        for ids, mask, row in zip(batch.input_ids, batch.attention_mask, batch.rows, strict=True):
            assert tuple(ids[mask.bool()].tolist()) == rows[row].ids
    assert sorted(seen) == list(range(23))
    lengths: Sequence[int] = [len(rows[row].ids) for row in seen]
    assert list(lengths) == sorted(lengths), "texts of like length stand together"


def test_nothing_to_batch_gives_no_batch() -> None:
    assert list(batches(loaded("llama"), [])) == []


def test_a_batch_keeps_its_rows_on_the_way_to_a_device() -> None:
    batch = pad(texts(), (2, 0), int(loaded("llama").tokenizer.pad_token_id))
    moved = batch.to(torch.device("meta"))
    assert moved.rows == (2, 0)
    assert {moved.input_ids.device.type, moved.attention_mask.device.type, moved.roles.device.type} == {"meta"}
