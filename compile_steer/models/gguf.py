"""Read models from GGUF files: what transformers reads of them, de-quantised, and what it leaves out."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from compile_steer.models.claims import require_counts, require_numbers

ROPE_FACTORS = "rope_freqs.weight"  # [d_head / 2], the divisors of the rotary frequencies
_INTEGERS = {kind for kind in gguf.GGUFValueType if "INT" in kind.name}
_ARCHITECTURES = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}


class WholeReader(gguf.GGUFReader):
    """A reader that stops where the file ends; the library's own goes on, through as many values as an array claims."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, within what is to be at byte {int(offset):,}")
        if isinstance(self.data, np.memmap):
            vars(self)["data"] = self.data.view(np.ndarray)  # a slice of a view costs a third
        return super()._get(offset, dtype, count, override_order)


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file that `folder` holds, or None."""
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def read_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any, list[str]]:
    """Return the model with de-quantised weights, its tokenizer, and every tensor that only file or model has.

    Raises `ArtifactError` for a file that claims what its tensors are not, else what transformers and gguf raise.
    """
    reader = WholeReader(file)
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    names = shapes.keys()
    numbers = {name: field.contents() for name, field in reader.fields.items() if field.types[0] in _INTEGERS}
    require_counts(file, numbers, shapes)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    require_numbers(file, config, shapes)
    # The file records the width of a head, but transformers does not read it for every family.
    width = reader.get_field(f"{config.model_type}.attention.key_length")
    if width is not None:
        config.head_dim = int(width.contents())
    if config.model_type == "gemma3_text":
        config.query_pre_attn_scalar = gemma3_scalar(config)
    # llama.cpp's llama graph adds a bias wherever the file has one. No GGUF field says so, but transformers' model has
    # biases only where its configuration does.
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_output.bias" in names
        config.mlp_bias = "blk.0.ffn_down.bias" in names
    with redirect_stderr(StringIO()):  # the progress bar has no switch of its own
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    # Llama 3 slows its rotations by factors that transformers does not read from the file.
    if ROPE_FACTORS in names:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / gguf_tensors(file)[ROPE_FACTORS].to(rotary.inv_freq)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    stored = set(_stored_names(reader, model).values())
    problems = [f"the file lacks {name}" for name in sorted(loading["missing_keys"])]
    problems += [f"the model has no place for {name}" for name in sorted(names - stored - {ROPE_FACTORS})]
    return model, tokenizer, problems


def gemma3_scalar(config: Any) -> int:
    """What llama.cpp's graph of Gemma 3 divides the square of attention's scores by, which no field says: another in the 27B."""
    return int(config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim)


def license_in(file: Path) -> object:
    """What the file says of its licence; None where it says nothing."""
    field = WholeReader(file).get_field("general.license")
    return None if field is None else field.contents()


def scales_rotations(file: Path) -> bool:
    """Whether the file has factors of the rotary frequencies, as Llama 3's do."""
    return any(tensor.name == ROPE_FACTORS for tensor in WholeReader(file).tensors)


def write_and_close(writer: gguf.GGUFWriter) -> None:
    """Write everything that was added to `writer`, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_types(file: Path, model: Any) -> dict[str, gguf.GGMLQuantizationType]:
    """The type in which the file stores each parameter of `model`, a model of its family, by the model's names."""
    reader = WholeReader(file)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    return {parameter: types[name] for parameter, name in _stored_names(reader, model).items() if name in types}


def gguf_tensors(file: Path) -> dict[str, Tensor]:
    """The file's tensors, de-quantised to fp32, by the file's names."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in WholeReader(file).tensors
    }


def _stored_names(reader: WholeReader, model: Any) -> dict[str, str]:
    """The file's name for each parameter of the model, where the family has one."""
    field = reader.get_field("general.architecture")
    kind = _ARCHITECTURES.get("" if field is None else str(field.contents()))
    if kind is None:
        return {}
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name, _value in model.named_parameters()}
    return {parameter: name for parameter, name in names.items() if name is not None}
