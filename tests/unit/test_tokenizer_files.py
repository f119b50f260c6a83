"""Token ids are those of tokenizer.json, whatever class its configuration names; one that makes no sure ids is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from compile_steer.common.errors import CompileSteerError
from compile_steer.export.gguf_tokenizer import tokenizer_fields
from compile_steer.models.load import load
from tests.helpers import byte_level

TEXT = "he was 1234 wÖrlds\n\nold  é w12"
DIGITS = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]
DIGITS[1] |= {"trim_offsets": True, "use_regex": True}


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    byte_level.saved("llama", tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "GPTNeoXTokenizerFast", "CodeGenTokenizer", "GemmaTokenizer", None]
)
def test_ids_are_those_of_the_file_whatever_class_the_library_makes_of_it(model: Path, name: str | None) -> None:
    steps = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": DIGITS}, "normalizer": {"type": "Lowercase"}}
    edit(model / "tokenizer.json", lambda content: content.update(steps))
    edit(model / "tokenizer_config.json", lambda content: content.update(tokenizer_class=name))
    tokenizer = load(str(model), device="cpu").tokenizer
    expected = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.decode(expected) == TEXT.lower()
    assert name != "GPT2Tokenizer" or set(tokenizer("x")) == {"input_ids", "attention_mask"}, "as its class says"
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")


def test_gguf_names_the_splitting_of_the_file(model: Path) -> None:
    steps = {"type": "Sequence", "pretokenizers": DIGITS}
    edit(model / "tokenizer.json", lambda content: content.update(pre_tokenizer=steps))
    edit(model / "tokenizer_config.json", lambda content: content.update(tokenizer_class="Qwen2Tokenizer"))
    fields = tokenizer_fields(load(str(model), device="cpu"), byte_level.VOCAB)
    assert {field.key: field.value for field in fields}["tokenizer.ggml.pre"] == "smollm"


def test_end_of_text_that_only_the_class_knows_stays(model: Path) -> None:
    def as_gpt2(content: Any) -> None:
        content["model"]["vocab"]["<|endoftext|>"] = content["model"]["vocab"].pop("</s>")
        content["added_tokens"][2]["content"] = "<|endoftext|>"

    edit(model / "tokenizer.json", as_gpt2)
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load(str(model), device="cpu").tokenizer
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token) == ("<|endoftext|>", 2, "<|endoftext|>")


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "dropout": (lambda content: content["model"].update(dropout=0.1), "leaves out merges at random"),
    "no bytes": (lambda content: content["model"].update(vocab={}, merges=[]), "no tokens of a text"),
    "no words": (
        lambda content: content.update(model={"type": "WordLevel", "vocab": {"a": 3}, "unk_token": "<unk>"}),
        r"Missing \[UNK\]",
    ),
    "unknown normaliser": (lambda content: content.update(normalizer={"type": "Magic"}), "cannot be loaded"),
    "merges of nothing": (lambda content: content["model"].update(merges=[["q", "zz"]]), "cannot be loaded"),
    "no added tokens": (lambda content: content.update(added_tokens=7), "cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizer_that_makes_no_sure_ids_is_refused_by_the_name_of_its_file(model: Path, case: str) -> None:
    change, problem = REFUSED[case]
    edit(model / "tokenizer.json", change)
    with pytest.raises(CompileSteerError, match=rf"tokenizer\.json.*{problem}|{problem}.*tokenizer\.json"):
        load(str(model), device="cpu")
