"""Loading: the requirements on a local folder, its revision, and the layout of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from compile_steer.common.errors import ArtifactError, LayoutError, RecipeError
from compile_steer.export.engine_support import GGUF_FILE
from compile_steer.export.gguf import write_gguf
from compile_steer.models.gguf import read_gguf
from compile_steer.models.load import LoadedModel, choose_device, load
from compile_steer.models.source import revision_of
from compile_steer.steering.layout import Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.sites import Site
from tests.contract.test_adapters import origin
from tests.helpers import byte_level
from tests.helpers.rounding import assert_close_to_rounding, assert_same_weights
from tests.helpers.tiny import (
    FAMILIES,
    FFN,
    HIDDEN,
    LAYERS,
    Padded,
    build,
    intervention,
    loaded,
    logits,
    program,
    texts,
    tokenizer,
)


@pytest.fixture
def folder(saved: Callable[[str], LoadedModel], tmp_path: Path) -> Path:
    """A model folder with its tokenizer, of this test's own."""
    copy = tmp_path / "model"
    shutil.copytree(saved("llama").source, copy)
    tokenizer().save_pretrained(copy)
    return copy


def test_a_local_folder_is_loaded_frozen_in_evaluation_mode(folder: Path) -> None:
    read = load(str(folder), device="cpu")
    inputs = Padded.of(texts(), "left")
    assert_same_weights(read.model, loaded("llama").model)
    assert_close_to_rounding(logits(read.model, inputs), logits(loaded("llama").model, inputs))
    assert not read.model.training
    assert not any(p.requires_grad for p in read.model.parameters())
    assert read.tokenizer("w7 w9")["input_ids"] == [7, 9]
    assert (read.id, read.source) == (str(folder), str(folder))
    half = load(str(folder), device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert repr(half) == f"LoadedModel({str(folder)!r}, {LAYERS} blocks, d_model {HIDDEN}, bfloat16, cpu)"


def test_the_revision_of_a_folder_follows_its_weights_and_not_its_name(folder: Path, tmp_path: Path) -> None:
    first = revision_of(str(folder))
    assert first.startswith("sha256:")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert revision_of(str(copy)) == first == load(str(copy), device="cpu").revision
    build("llama", seed=1).save_pretrained(copy)
    assert revision_of(str(copy)) != first


def test_a_reference_that_is_not_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    for reference, message in (
        ("./nowhere", "no such folder; needed: a folder with config.json and weights"),
        ("./nowhere.gguf", "no such file"),
        (str(tmp_path), "has no config.json"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(reference, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="holds no model.safetensors"):
        load(str(folder), device="cpu")


def test_damaged_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((RecipeError, ArtifactError), match="model"):
        load(str(folder), device="cpu")


def test_dequantised_model_that_was_edited_in_the_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    one = byte_level.saved("llama", tmp_path / "base")
    write_gguf(tmp_path / "g", WeightPatch(), one, "f16", origin(one, "gguf-f16"), "")
    first = load(str(tmp_path / "g" / GGUF_FILE), device="cpu")
    cached = Path(first.source)
    made = (cached / "tokenizer_config.json").read_bytes()
    assert load(str(tmp_path / "g" / GGUF_FILE), device="cpu").revision == first.revision
    (cached / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    again = load(str(tmp_path / "g" / GGUF_FILE), device="cpu")
    assert again.revision == first.revision and (cached / "tokenizer_config.json").read_bytes() == made
    monkeypatch.setattr(
        "compile_steer.models.source.read_gguf", lambda *args: (*read_gguf(*args)[:2], ["the file lacks x"])
    )
    shutil.rmtree(cached)
    with pytest.raises(ArtifactError, match=r"model\.gguf: the file lacks x"):
        load(str(tmp_path / "g" / GGUF_FILE), device="cpu")


def test_an_unknown_dtype_or_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="dtype 'int8' is unknown; use float32, bfloat16, float16"):
        load("./anything", dtype="int8")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(RecipeError, match=f"device '{name}' cannot be used here"):
            choose_device(name)
    assert choose_device("cpu") == torch.device("cpu")


# ------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_finds_blocks_and_output_projections_of_a_family(family: str) -> None:
    model = loaded(family).model
    layout = Layout.of(model)
    assert (layout.n_layers, layout.d_model) == (LAYERS, HIDDEN)
    for kind in layout.projection_kinds(2):
        d_in = FFN if kind == "mlp" else None
        projection = layout.output_projection(2, kind)
        assert model.get_submodule(projection.name) is projection.module
        weight = projection.module.weight
        assert isinstance(weight, nn.Parameter)
        assert weight.numel() % HIDDEN == 0
        assert d_in is None or weight.numel() == HIDDEN * d_in
    assert (layout.norm(2, "attn") is not None) == (family in ("gemma2", "gemma3_text", "olmo2"))
    assert layout.stream_scale(2, "mlp_out") == (0.37 if family == "granite" else 1.0)


def test_a_mixture_of_experts_has_no_output_projection_in_its_mlp() -> None:
    layout = loaded("qwen3_moe").layout
    assert layout.projection_kinds(2) == ("attn",)
    with pytest.raises(LayoutError, match="the MLP of qwen3_moe is a mixture of experts"):
        layout.output_projection(2, "mlp")


def test_a_layout_refuses_sites_and_programs_the_model_does_not_have() -> None:
    layout = loaded("llama").layout
    with pytest.raises(LayoutError, match="layer 4 does not exist in this model; it has blocks 0 to 3"):
        layout.hook_module(Site(4))
    with pytest.raises(
        ArtifactError, match="made for 'tiny-gpt2', revision sha256:tiny-gpt2; found 'tiny-llama', .*: other weights"
    ):
        layout.require_program(program("gpt2", intervention()), "tiny-llama", loaded("llama").revision)
    layout.require_program(program("llama", intervention()), "tiny-llama", loaded("llama").revision)


def test_the_layout_of_a_wrapped_model_is_the_inner_one_s() -> None:
    class Wrapped(nn.Module):
        def get_base_model(self) -> PreTrainedModel:
            return loaded("gpt2").model

    assert Layout.of(Wrapped()).model is loaded("gpt2").model
