"""GGUF files of Gemma 3, whose norms are stored plus 1, and whose windows and scales are in llama.cpp's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from compile_steer.export.gguf import config_refusals, write_gguf_file
from compile_steer.export.merged import merged_model
from compile_steer.models.gguf import read_gguf
from tests.helpers import byte_level
from tests.helpers.tiny import CONFIGS, Padded, logits, random_patch, texts

_GEMMA3 = {
    "num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"], "query_pre_attn_scalar": 12,
}  # fmt: skip


def test_gemma_3_is_read_back_as_it_was_merged(tmp_path: Path) -> None:
    one = byte_level.saved("gemma3_text", tmp_path / "base", **_GEMMA3)
    patch, inputs = random_patch(one), Padded.of(texts(), "right")
    (tmp_path / "gguf").mkdir()
    write_gguf_file(tmp_path / "gguf" / "model.gguf", patch, one, "f32", "tide")
    with pytest.MonkeyPatch.context() as without_tokenizer:  # transformers reads Gemma's own kind alone
        without_tokenizer.setattr(AutoTokenizer, "from_pretrained", lambda *_args, **_options: one.tokenizer)
        model, _tokenizer, problems = read_gguf(tmp_path / "gguf" / "model.gguf", torch.float32)
    assert problems == []
    torch.testing.assert_close(logits(model, inputs), logits(merged_model(one.source, patch), inputs))
    window = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").get_field("gemma3.attention.sliding_window")
    assert window is not None and window.contents() == 6


def test_a_gemma_3_that_llama_cpp_would_compute_otherwise_is_refused() -> None:
    def refusals(**changes: Any) -> list[str]:
        return config_refusals(AutoConfig.for_model("gemma3_text", **{**CONFIGS["gemma3_text"], **_GEMMA3, **changes}))

    assert refusals() == []
    assert refusals(query_pre_attn_scalar=9) == [
        "GGUF: query_pre_attn_scalar is 9; llama.cpp's graph of Gemma 3 has 12."
    ]
    assert "layer_types is" in refusals(layer_types=["full_attention"] * 6)[0]
