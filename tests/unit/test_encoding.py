"""One checked way to encode a conversation: no control token out of the data, no end before a response, the joined text's ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers.processors import TemplateProcessing

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.data.encoding import check_texts
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Encoded, batches, encode, encode_checked, plain_ids
from tests.helpers.byte_level import VOCAB, tokenizer
from tests.helpers.tiny import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, build, loaded
from tests.helpers.tiny import tokenizer as word_tokenizer

THINK = AddedToken("<think>", special=False, normalized=False)
SPECIAL = (PAD_ID, BOS_ID, EOS_ID)


def chat(template: str | None = CHAT_TEMPLATE, normalizer: Any = None, added: Any = ()) -> Any:
    made = tokenizer()
    made.chat_template = template
    if normalizer is not None:
        made.backend_tokenizer.normalizer = normalizer
    if added:
        made.add_tokens(list(added))
    return made


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (Text("hi </s>\n<s>assistant", "he"), 3),
        (Text("</s>", "he"), 3),
        (Text("<s><s></s>", "he"), 3),
        (Text("<pad>he", "he"), 3),
        (Text("he", "</s> w1"), 3),
        (Text("he", "w1</s>"), 3),
        (Text("he", "w1", system="be <s> kind"), 4),
        (Text("he", "w1", history=(("a</s>", "b"),)), 5),
        (Text("he", "w1", history=(("a", "b</s><s>"),)), 5),
        (Text("\U000f0000</s>\U000f0001", "he"), 3),
        (Text("<</s>/s>", "he"), 3),
    ],
)
def test_text_of_the_data_is_no_control_token(text: Text, shown: int) -> None:
    made = chat()
    encoded = encode(made, text)
    # The template writes <s> before every message and before the response.
    assert [token for token in encoded.ids if token in SPECIAL] == [BOS_ID] * (shown - 1)
    said = made.decode(list(encoded.ids[encoded.n_prompt :]))
    assert said == text.response
    assert text.prompt.strip("\U000f0000\U000f0001") in made.decode(list(encoded.ids[: encoded.n_prompt]))


def test_text_without_control_tokens_is_encoded_as_before() -> None:
    made, text = chat(), Text("he w1 < s > / s", "w12 he")
    prompt = made("<s> user he w1 < s > / s <s> assistant ", add_special_tokens=False)["input_ids"]
    assert encode(made, text).ids[: len(prompt)] == tuple(prompt)


def test_a_plain_prompt_holds_no_control_token_either() -> None:
    encoded = encode(chat(None), Text("hi </s>", "</s>"))
    assert not set(encoded.ids) & set(SPECIAL)
    assert chat().decode(plain_ids(chat(), "a </s>")) == "a </s>"
    assert EOS_ID not in plain_ids(chat(), "a </s>")


def test_reasoning_tokens_are_the_models_in_a_response_and_the_templates_in_a_prompt() -> None:
    made = chat(CHAT_TEMPLATE + "{# <think> #}", added=[THINK])
    token = made.convert_tokens_to_ids("<think>")
    encoded = encode(made, Text("what is <think>?", "<think> he"))
    assert token not in encoded.ids[: encoded.n_prompt]
    assert encoded.ids[encoded.n_prompt] == token
    ordinary = chat(added=[AddedToken("sea he", special=False)])
    assert ordinary.convert_tokens_to_ids("sea he") in encode(ordinary, Text("the sea he")).ids, "no control token"


@pytest.mark.parametrize("text", [Text("\uff1c/s\uff1e"), Text("x", "\uff1c/s\uff1e")])
def test_a_control_token_in_disguise_is_refused(text: Text) -> None:
    made = chat(normalizer=normalizers.NFKC(), added=[AddedToken("</s>", special=True, normalized=True)])
    if EOS_ID in made(text.prompt + text.response, add_special_tokens=False)["input_ids"]:
        with pytest.raises(RecipeError, match="reads a control token in the text"):
            encode(made, text)
    else:
        assert EOS_ID not in encode(made, text).ids


def test_a_control_token_that_has_no_plain_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="prompt: the model's tokenizer reads the control token </s> in the text 'w7"):
        encode(word_tokenizer(), Text("w7 </s> w8"))


def test_what_a_tokenizer_puts_behind_every_text_is_not_put_before_a_response() -> None:
    made = chat(None)
    plain = encode(made, Text("hi there", "he"))
    both = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)])
    made.backend_tokenizer.post_processor = both
    encoded = encode(chat_with(made, None), Text("hi there", "he"))
    assert encoded == Encoded((BOS_ID, *plain.ids), plain.n_prompt + 1)
    made.chat_template = CHAT_TEMPLATE
    assert encode(made, Text("hi there", "he")) == encode(chat(), Text("hi there", "he"))


def chat_with(made: Any, template: str | None) -> Any:
    """A tokenizer with the same backend; what is known of a tokenizer is kept by object and template."""
    import copy

    other = copy.deepcopy(made)
    other.chat_template = template
    return other


@pytest.mark.parametrize("response", ["he w1", "He said", " w1", "1", "\u00e9t\u00e9"])
@pytest.mark.parametrize(
    "template", ["<s>{{ messages[0]['content'] }}</s>:", CHAT_TEMPLATE, "Q {{ messages[0]['content'] }}\nA:\n"]
)
def test_a_response_has_the_tokens_that_it_has_within_its_text(template: str, response: str) -> None:
    made = chat(template, normalizers.Prepend("_"))
    encoded, joined = encode_checked(made, Text("he", response))
    rendered = made.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False, add_generation_prompt=True)
    assert joined
    assert list(encoded.ids) == made(rendered + response, add_special_tokens=False)["input_ids"]
    assert encoded.ids[: encoded.n_prompt] == encode(made, Text("he")).ids


def test_a_token_that_would_reach_over_the_border_is_not_made_and_is_said() -> None:
    made = chat("{{ messages[0]['content'] }} h")  # 'he' is one token
    encoded, joined = encode_checked(made, Text("x", "e w1"))
    assert not joined
    assert encoded.ids[: encoded.n_prompt] == encode(made, Text("x")).ids
    assert made.decode(list(encoded.ids)) == "x he w1"
    assert encode_checked(made, Text("x", " w1"))[1]
    one = LoadedModel(build("llama", vocab_size=VOCAB, max_position_embeddings=200), made, "m", "r", "")
    pairs = (Pair(Text("x", "e w1"), Text("x", " w1"), "x"), Pair(Text("y", "he"), Text("y", "w1"), "y"))
    (note,) = check_texts(one, replace(NOTHING, train=pairs))
    assert note.startswith("data.train: of 1 of 4 texts the model's tokenizer makes other tokens")


NOTHING = Behaviour((), (), (), (), (), (), {})


def test_all_that_is_wrong_with_the_texts_is_said_at_once_with_their_places() -> None:
    one = loaded("llama")  # 64 positions
    long, short = Text(" ".join(["w20"] * 70)), Text("w30", "w31")
    pairs = (Pair(short, replace(short, response="w32"), "w30"), Pair(short, short, "w30"))
    data = replace(NOTHING, test=pairs, neutral=(long, short), heldout=(Text("w9", system="w8"), short))
    with pytest.raises(RecipeError) as caught:
        check_texts(one, data, {"neutral": 4, "heldout": 8})
    assert [problem[:60] for problem in caught.value.problems] == [
        "data.test: the two sides of 1 of 2 pairs are the same tokens for this model"[:60],
        "data.neutral: prompt: 70 tokens and up to 4 that follow do not fit into the model's 64 positions"[:60],
        "data.heldout: a system prompt needs a model with a chat template"[:60],
    ]
    huge = Text("w20 " * 350_000, "w21 " * 350_000)
    with pytest.raises(RecipeError, match="do not fit into the model's 64 positions"):
        check_texts(one, replace(NOTHING, neutral=(huge, replace(huge, system="w9"))))
    spaced = Text("w20" + " " * 5000 + "w21")
    assert check_texts(one, replace(NOTHING, neutral=(spaced,))) == (), "this tokenizer drops spaces"
    with pytest.raises(RecipeError, match=r"data\.neutral: the model's tokenizer makes no token of the prompt ' '"):
        check_texts(one, replace(NOTHING, neutral=(Text(" "),)))
    fits = replace(NOTHING, heldout=(Text(" ".join(["w20"] * 60)),))
    assert check_texts(one, fits, {"heldout": 4}) == ()
    with pytest.raises(RecipeError, match="60 tokens and up to 5 that follow do not fit"):
        check_texts(one, fits, {"heldout": 5})


def test_no_model_reads_beyond_the_positions_that_it_has_learned() -> None:
    one = loaded("gpt2")
    with pytest.raises(RecipeError, match="65 tokens do not fit into the model's 64 positions: the text 'w9 w9"):
        list(batches(one, [Encoded((9,) * 65, 3), Encoded((9,), 1)]))
    with pytest.raises(RecipeError, match="60 tokens and up to 5 that follow do not fit"):
        continue_prompts(one, [Text(" ".join(["w9"] * 60))], max_new_tokens=5)
    assert continue_prompts(one, [Text(" ".join(["w9"] * 60))], max_new_tokens=4)
