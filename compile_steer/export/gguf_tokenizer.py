"""A tokenizer as the fields of a GGUF file: of a base that is one itself as they are, else of a byte-level BPE.

llama.cpp splits text before it merges bytes, by a regex that the file only names. A name is given only where the
tokenizer's own splitting is known to be that regex; any other would be read as other tokens, so it is refused.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import gguf
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.common.errors import CannotLower
from compile_steer.models.gguf import WholeReader
from compile_steer.models.load import LoadedModel
from compile_steer.models.source import gguf_of

_FIELDS = "tokenizer."
_TEMPLATE = gguf.Keys.Tokenizer.CHAT_TEMPLATE
_TYPES = gguf.TokenType
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a byte-level BPE splits text -> what llama.cpp calls that.
_SPLITS = {
    "gpt2": "gpt-2",
    "digits, gpt2": "smollm",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


class Field(NamedTuple):
    """The arguments of `GGUFWriter.add_key_value`; `element_kind` is the type of an array's elements."""

    key: str
    value: Any
    kind: gguf.GGUFValueType
    element_kind: gguf.GGUFValueType | None = None


def tokenizer_fields(loaded: LoadedModel, vocabulary: int) -> list[Field]:
    """The fields of the tokenizer of `loaded`, with its chat template; `vocabulary` is the number of rows of the embeddings.

    Tokens that the tokenizer lacks are filled up as unused. Raises `CannotLower` where llama.cpp is not known to have it.
    """
    source = gguf_of(loaded.id)
    if source is None:
        fields = _bpe_fields(loaded.tokenizer, vocabulary)
    else:
        stored = WholeReader(source).fields.values()
        fields = [
            Field(field.name, field.contents(), *field.types) for field in stored if field.name.startswith(_FIELDS)
        ]
    template = loaded.tokenizer.chat_template
    if isinstance(template, str):  # of a recipe with prompt_format it is not the base's own
        fields = [field for field in fields if field.key != _TEMPLATE]
        fields.append(Field(_TEMPLATE, template, gguf.GGUFValueType.STRING))
    return fields


def _bpe_fields(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Field]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CannotLower(
            "GGUF: the tokenizer has no tokenizer.json; needed: a byte-level BPE, or a base that is a GGUF."
        )
    content = json.loads(backend.to_str())
    split = _split(content)
    if content["model"]["type"] != "BPE" or split not in _SPLITS:
        raise CannotLower(
            f"GGUF: the tokenizer is {content['model']['type']} that splits text by {split}; needed: a byte-level BPE that "
            "splits as GPT-2, SmolLM, Llama 3 or Qwen2 do, or a base that is itself a GGUF file. For another one convert "
            "the merged-fp32 folder with llama.cpp's own convert_hf_to_gguf.py."
        )
    tokens, types = _tokens(backend, content, vocabulary)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    kinds, keys = gguf.GGUFValueType, gguf.Keys.Tokenizer
    numbers = {
        keys.BOS_ID: tokenizer.bos_token_id,
        keys.EOS_ID: tokenizer.eos_token_id,
        keys.UNK_ID: tokenizer.unk_token_id,
        keys.PAD_ID: tokenizer.pad_token_id,
    }
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]  # puts a special token before a text
    return [
        Field(keys.MODEL, "gpt2", kinds.STRING),
        Field(keys.PRE, _SPLITS[split], kinds.STRING),
        Field(keys.LIST, tokens, kinds.ARRAY, kinds.STRING),
        Field(keys.TOKEN_TYPE, types, kinds.ARRAY, kinds.INT32),
        *([Field(keys.MERGES, merges, kinds.ARRAY, kinds.STRING)] if merges else []),
        *(Field(key, number, kinds.UINT32) for key, number in numbers.items() if number is not None),
        Field(keys.ADD_BOS, begins, kinds.BOOL),
    ]


def _split(content: dict[str, Any]) -> str:
    """How the tokenizer splits text: a regex, 'gpt2' for ByteLevel's own, or what else there is as JSON."""
    pre_tokenizer = content["pre_tokenizer"] or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if content["normalizer"] not in (None, {"type": "NFC"}):  # llama.cpp normalises nothing; most text is NFC already
        return json.dumps(content["normalizer"])
    *before, last = steps
    if (last.get("type"), last.get("add_prefix_space")) == ("ByteLevel", False):
        match before, last["use_regex"]:
            case [], True:
                return "gpt2"
            case [{"type": "Digits", "individual_digits": True}], True:
                return "digits, gpt2"
            case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}], False:
                return str(regex)
    return json.dumps(content["pre_tokenizer"])


def _tokens(backend: Any, content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """All tokens by number, and their types: added ones are matched whole in a text, special ones are not shown."""
    known = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    if max(known) >= vocabulary:
        raise CannotLower(f"GGUF: the tokenizer's tokens go up to {max(known)}, the embeddings have {vocabulary} rows.")
    added = content["added_tokens"]
    kinds = {token["id"]: _TYPES.CONTROL if token["special"] else _TYPES.USER_DEFINED for token in added}
    tokens = [known.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    types = [int(kinds.get(n, _TYPES.NORMAL if n in known else _TYPES.UNUSED)) for n in range(vocabulary)]
    return tokens, types
