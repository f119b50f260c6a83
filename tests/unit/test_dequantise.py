"""Quantised folders become plain ones where transformers can do that here, and are refused with the way out elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.models.load import load
from compile_steer.tools.serving.export import export_base
from tests.helpers.tiny import build, chat_tokenizer

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantised(folder: Path, family: str, settings: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """A tiny model of that family in `folder`; returns its tensors, which a test quantises and saves."""
    build(family, **changes).bfloat16().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return load_file(folder / "model.safetensors")


def fp8(folder: Path) -> dict[str, Tensor]:
    """Every projection in FP8 with one scale for each block of 8 by 8; returns what the tensors mean."""
    settings = {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head"]}
    stored, meant = {}, {}
    for name, value in quantised(folder, "llama", settings).items():
        stored[name] = meant[name] = value
        if "proj" in name:
            blocks = value.float().unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
            scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
            stored[name] = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0]
            grown = stored[name].float().unflatten(0, (-1, 8)).unflatten(2, (-1, 8)) * scale
            meant[name] = grown.flatten(2).flatten(0, 1).bfloat16()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return meant


def mxfp4(folder: Path) -> dict[str, Tensor]:
    """The experts of a mixture in MXFP4; returns what the tensors mean."""
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    generator = torch.Generator().manual_seed(0)
    stored, meant = {}, {}
    for name, value in quantised(folder, "gpt_oss", settings, intermediate_size=32).items():
        stored[name] = meant[name] = value
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, d_in, d_out = value.shape
            codes = torch.randint(0, 16, (experts, d_out, d_in // 32, 32), generator=generator)
            scales = torch.randint(120, 130, (experts, d_out, d_in // 32), generator=generator)
            del stored[name]
            stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
            stored[f"{name}_scales"] = scales.to(torch.uint8)
            numbers = torch.tensor(FP4)[codes] * 2.0 ** (scales - 127)[..., None]
            meant[name] = numbers.flatten(2).transpose(1, 2).bfloat16()
    save_file(
        {name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return meant


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_a_plain_copy_has_the_values_that_the_codes_mean(make: Any, tmp_path: Path) -> None:
    meant = make(tmp_path / "few")
    with pytest.raises(
        ArtifactError, match=rf"quantised, by {make.__name__}.*compile-steer base .*few --dequantize --out DIR"
    ):
        load(str(tmp_path / "few"))
    export_base(str(tmp_path / "few"), tmp_path / "plain", dequantize=True)
    plain = load(str(tmp_path / "plain"), dtype="bfloat16")
    state = plain.model.state_dict()
    assert state.keys() == meant.keys()
    assert [name for name, value in meant.items() if not torch.equal(state[name], value)] == []
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert plain.tokenizer.chat_template == chat_tokenizer().chat_template


@pytest.mark.parametrize("method", ["compressed-tensors", "bitsandbytes"])
def test_where_its_library_is_missing_that_is_named_with_what_is_still_possible(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised(tmp_path / "few", "llama", {"quant_method": method})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ArtifactError, match=f"pip install {method}. Without it name the unquantised .*adapter"):
        export_base(str(tmp_path / "few"), tmp_path / "plain", dequantize=True)
    assert not (tmp_path / "plain").exists()


def test_what_compressed_tensors_packed_becomes_plain(tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="not among our own libraries")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = build("llama").bfloat16()
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="float-quantized")
    quantization.apply_quantization_config(model, settings)
    meant = {name: value.clone() for name, value in model.state_dict().items() if "scale" not in name}
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(dim=1, keepdim=True) / 448
    compressor = compressors.ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "few")
    chat_tokenizer().save_pretrained(tmp_path / "few")
    compressor.update_config(str(tmp_path / "few"))
    export_base(str(tmp_path / "few"), tmp_path / "plain", dequantize=True)
    for name, value in load(str(tmp_path / "plain"), dtype="bfloat16").model.state_dict().items():
        error = (value - meant[name]).float().norm() / meant[name].float().norm()
        assert error < 0.05 and (error > 0) == ("proj" in name), name


@pytest.mark.parametrize("method", ["gptq", "awq", "a\nb", 7, None])
def test_other_kinds_are_refused_and_nothing_is_left(method: Any, tmp_path: Path) -> None:
    quantised(tmp_path / "few", "llama", {"quant_method": method})
    with pytest.raises(ArtifactError, match=r"few is quantised by .*needed: fp8 or mxfp4 or .*Of others name"):
        export_base(str(tmp_path / "few"), tmp_path / "plain", dequantize=True)
    with pytest.raises(ArtifactError, match="is quantised, by") as refused:
        export_base(str(tmp_path / "few"), tmp_path / "plain")
    assert "--dequantize" not in str(refused.value) and not (tmp_path / "plain").exists()


def test_a_missing_scale_or_a_plain_folder_is_refused(tmp_path: Path) -> None:
    fp8(tmp_path / "few")
    tensors = load_file(tmp_path / "few" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "few" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError):
        export_base(str(tmp_path / "few"), tmp_path / "plain", dequantize=True)
    build("llama").save_pretrained(tmp_path / "whole")
    with pytest.raises(ArtifactError, match="whole is not quantised"):
        export_base(str(tmp_path / "whole"), tmp_path / "plain", dequantize=True)
    assert not (tmp_path / "plain").exists()
