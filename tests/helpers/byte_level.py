"""Tiny models with a byte-level tokenizer, which llama.cpp can have: for everything that is written as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compile_steer.models.load import LoadedModel
from compile_steer.models.source import revision_of
from tests.helpers.tiny import BOS_ID, CHAT_TEMPLATE, EOS_ID, PAD_ID, build

MERGES = [("h", "e"), ("Ġ", "w"), ("Ġw", "1")]
VOCAB = 3 + 256 + len(MERGES) + 4  # four rows of the embeddings are no token


def tokenizer(split: Any = None) -> PreTrainedTokenizerFast:
    """Bytes, three merges and three special tokens; GPT-2's splitting unless another is given."""
    vocab = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID}
    for token in (*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)):
        vocab[token] = len(vocab)
    raw = Tokenizer(models.BPE(vocab, MERGES))
    raw.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    words.chat_template = CHAT_TEMPLATE
    return words


def saved(family: str, folder: Path, **changes: Any) -> LoadedModel:
    """A tiny model of `family` with that tokenizer, in `folder` and in memory."""
    model = build(family, vocab_size=VOCAB, **changes)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return LoadedModel(model, tokenizer(), f"tiny-{family}", revision_of(str(folder)), str(folder))
