"""A model's GGUF file as transformers reads it, de-quantised, with what transformers leaves out."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

ROPE_FACTORS = "rope_freqs.weight"  # [d_head / 2]: what each frequency is divided by
_ARCHITECTURES = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file that `folder` holds, or None."""
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The model in `file` with its weights de-quantised, and what is odd: tensors that file or model has for itself.

    llama.cpp's llama graph adds a bias wherever the file has one, transformers' only where the config says so, which no
    GGUF records: it is told by the tensors. The width of a head is recorded, but not read for every family; nor are the
    factors by which Llama 3 slows its rotations.

    Raises:
        Exception: what transformers and gguf raise for a file that is damaged, or of a family they do not know.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    width = reader.get_field(f"{config.model_type}.attention.key_length")
    if width is not None:
        config.head_dim = int(width.contents())
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_output.bias" in names
        config.mlp_bias = "blk.0.ffn_down.bias" in names
    with redirect_stderr(StringIO()):  # its progress bar has no switch of its own
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
    if ROPE_FACTORS in names:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / tensors(file)[ROPE_FACTORS].to(rotary.inv_freq)
    odd = [f"the file lacks {name}" for name in sorted(loading["missing_keys"])]
    stored = set(_stored_names(reader, model).values())
    return model, odd + [f"the model has no place for {name}" for name in sorted(names - stored - {ROPE_FACTORS})]


def write_out(writer: gguf.GGUFWriter) -> None:
    """Write all that was added to `writer`, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_kinds(file: Path, model: Any) -> dict[str, gguf.GGMLQuantizationType]:
    """How the file stores each of the parameters of `model`, a model of its family, by their own names."""
    reader = gguf.GGUFReader(file)
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    stored = _stored_names(reader, model)
    return {parameter: kinds[name] for parameter, name in stored.items() if name in kinds}


def tensors(file: Path) -> dict[str, Tensor]:
    """What the file holds, de-quantised to fp32, under its own names."""
    found = gguf.GGUFReader(file).tensors
    return {one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for one in found}


def _stored_names(reader: gguf.GGUFReader, model: Any) -> dict[str, str]:
    """What the file would call each of the model's parameters, as far as its family has a name for it."""
    field = reader.get_field("general.architecture")
    kind = _ARCHITECTURES.get("" if field is None else str(field.contents()))
    if kind is None:
        return {}
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {one: names.get_name(one, try_suffixes=(".weight", ".bias")) for one, _value in model.named_parameters()}
    return {parameter: name for parameter, name in found.items() if name is not None}
