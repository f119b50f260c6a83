"""What settings claim is compared with the tensors in the files before a model of that size is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.formats.foreign import ImportOptions
from compile_steer.formats.vectors import read_gguf
from compile_steer.models.load import load
from tests.helpers.tiny import saved

HUGE = 10**6
LIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "blocks": ("llama", {"num_hidden_layers": HUGE}, "num_hidden_layers is 1000000; needed: at most 108,"),
    "blocks of a part": ("llama", {"text_config": {"num_hidden_layers": HUGE}}, r"text_config\.num_hidden_layers is"),
    "blocks by another name": ("gpt2", {"n_layer": HUGE}, "n_layer is 1000000"),
    "kinds of attention": ("gemma3_text", {"num_hidden_layers": HUGE, "layer_types": None}, "num_hidden_layers is"),
    "experts": ("gpt_oss", {"num_local_experts": HUGE}, "num_local_experts is 1000000; needed: at most 110,"),
    "vocabulary": ("llama", {"vocab_size": 10**8}, r"numbers, its tensors hold .* more than 97 \(vocab_size 1000000"),
    "width": ("llama", {"hidden_size": 10**7, "head_dim": 12}, r"\(hidden_size 10000000\)"),
    "width of the MLP": ("llama", {"intermediate_size": 10**7}, r"\(intermediate_size 10000000\)"),
    "width of a head": ("llama", {"head_dim": 10**7}, r"\(head_dim 10000000\)"),
    "experts' width": ("qwen3_moe", {"moe_intermediate_size": 10**7}, r"\(.*moe_intermediate_size 10000000\)"),
    "positions": ("gpt2", {"n_positions": 10**8}, r"numbers.*n_positions 100000000"),
    "rotations": (
        "phi",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}},
        "numbers",
    ),
    "labels": ("llama", {"num_labels": 10**9}, "num_labels is 1000000000"),
    "padding": ("llama", {"pad_token_id": 5000}, "pad_token_id is 5000; needed: below vocab_size, 97"),
    "family": ("llama", {"model_type": ["llama"]}, r"model_type is \['llama'\]"),
}


@pytest.mark.parametrize("case", LIES)
def test_sizes_that_the_files_do_not_hold_are_refused_before_they_are_built(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes, problem = LIES[case]
    saved(family, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", None)  # nothing is asked to build it
    with pytest.raises(ArtifactError, match=rf"config\.json.*{problem}"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "describes a model of .* numbers, its tensors hold 256"),
        ({"block_count": HUGE}, r"llama\.block_count is 1000000; needed: at most 102,"),
        ({"block_count": 1, "embedding_length": 10**6, "feed_forward_length": 10**6}, "hidden_size 1000000"),
        ({"block_count": 1, "vocab_size": 10**9, "embedding_length": 32}, "vocab_size 1000000000"),
    ],
)
def test_gguf_that_claims_what_it_does_not_hold_is_refused(
    tmp_path: Path, settings: dict[str, int], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    for name, value in settings.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((16, 16), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ArtifactError, match=rf"base\.gguf.*{problem}"):
        load(str(tmp_path / "base.gguf"), device="cpu")
    assert not list(tmp_path.glob("cache/models/*"))


def test_array_of_a_gguf_that_is_longer_than_the_file_ends_with_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_array("x", [7] * 4096)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    content = (tmp_path / "base.gguf").read_bytes()
    claimed = content.replace((4096).to_bytes(8, "little"), (2**40).to_bytes(8, "little"))
    (tmp_path / "base.gguf").write_bytes(claimed)
    with pytest.raises(RecipeError, match=rf"base\.gguf.*it ends at byte {len(content):,}, within"):
        load(str(tmp_path / "base.gguf"), device="cpu")
    with pytest.raises(ArtifactError, match=rf"base\.gguf.*it ends at byte {len(content):,}, within"):
        read_gguf(tmp_path / "base.gguf", ImportOptions(2, 8, 0, torch.Generator()))


@pytest.mark.parametrize("changes", [{"max_window_layers": HUGE}, {"max_position_embeddings": 10**9}])
def test_numbers_that_build_nothing_are_free(tmp_path: Path, changes: dict[str, int]) -> None:
    base = saved("qwen2", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    again = load(str(tmp_path), device="cpu").model
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in base.model.named_parameters())
