"""The merged model as one GGUF file for llama.cpp: the fp32 sum, rounded once, under llama.cpp's names.

Matrices are stored as the form says; vectors (norms, biases) stay F32, so an exact bias stays exact. A matrix whose rows
are no whole number of blocks is F16, and in q4_0 the one that gives the logits is Q8_0: as llama.cpp's own quantiser does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compile_steer.artifacts.files import new_folder
from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.export.gguf_tokenizer import Field, tokenizer_fields
from compile_steer.export.llama_cpp import Arrangement, refusals
from compile_steer.export.merged import merged_model, patched_config
from compile_steer.models.gguf import ROPE_FACTORS, write_out
from compile_steer.models.load import LoadedModel, gguf_of
from compile_steer.steering.patch import WeightPatch

GGUF_FILE = "model.gguf"
_Kind = gguf.GGMLQuantizationType
GGUF_KINDS: Mapping[str, tuple[_Kind, gguf.LlamaFileType]] = {
    "f32": (_Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# The largest value that each stores: half precision's, times what a block's scale is multiplied by.
_LARGEST = {_Kind.F16: 65504.0, _Kind.Q8_0: 127 * 65504.0, _Kind.Q4_0: 8 * 65504.0}


def gguf_refusals(patch: WeightPatch, loaded: LoadedModel) -> list[str]:
    """Why the base with `patch` cannot be written as GGUF; empty where it can. Nothing is computed."""
    config = patched_config(loaded.source, patch)
    problems = refusals(config)
    if gguf_of(loaded.id) is None:  # else its fields are copied as they are
        try:
            tokenizer_fields(loaded, config.vocab_size)
        except CannotLower as error:
            problems += error.problems
    return problems


def write_gguf(
    folder: Path, patch: WeightPatch, loaded: LoadedModel, precision: str, provenance: Provenance, card: str
) -> None:
    """Write the merged model to `folder`/model.gguf, with its provenance and card, as a whole or not at all.

    Args:
        precision: f32, f16, q8_0 or q4_0.

    Raises:
        CannotLower: llama.cpp would not compute the same. ArtifactError: as `write_merged` does, or a value is too large.
    """
    with new_folder(folder) as new:
        write_gguf_file(new / GGUF_FILE, patch, loaded, precision, provenance.name)
        provenance.write(new)
        (new / CARD).write_text(card, encoding="utf-8")


def write_gguf_file(path: Path, patch: WeightPatch, loaded: LoadedModel, precision: str, name: str) -> None:
    """Write the file alone, with `name` in it; raises what `write_gguf` raises."""
    problems = gguf_refusals(patch, loaded)
    if problems:
        raise CannotLower(problems)
    model = merged_model(loaded.source, patch).requires_grad_(False)
    _write(path, model, tokenizer_fields(loaded, model.config.vocab_size), precision, name)


def _write(path: Path, model: PreTrainedModel, fields: list[Field], precision: str, name: str) -> None:
    arrangement = Arrangement.of(model.config)
    writer = gguf.GGUFWriter(path, arrangement.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(GGUF_KINDS[precision][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, model.config)
    for field in fields:
        field.add(writer)
    for parameter, tensor in model.named_parameters():  # a tied head is not among them
        stored_as = arrangement.name(parameter)
        gives_logits = stored_as == ("token_embd.weight" if model.config.tie_word_embeddings else "output.weight")
        kind = _kind(tensor, precision, gives_logits)
        _require_room(parameter, tensor, kind)
        values = arrangement.rows(parameter, tensor).float().contiguous().numpy()
        writer.add_tensor(stored_as, gguf.quantize(values, kind), raw_dtype=kind)
    if model.config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor(ROPE_FACTORS, _rope_factors(model))
    write_out(writer)


def _add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _rope_factors(model: PreTrainedModel) -> np.ndarray:
    """What llama.cpp divides the unscaled frequencies by to have the model's own, [d_head / 2]."""
    own = model.base_model.rotary_emb.inv_freq.double()
    exponents = torch.arange(len(own), dtype=torch.float64) / len(own)
    factors: Tensor = model.config.rope_parameters["rope_theta"] ** -exponents / own
    return factors.float().numpy()


def _kind(tensor: Tensor, precision: str, gives_logits: bool) -> gguf.GGMLQuantizationType:
    if tensor.ndim < 2:
        return _Kind.F32
    wanted = _Kind.Q8_0 if gives_logits and precision == "q4_0" else GGUF_KINDS[precision][0]
    block, _bytes = gguf.GGML_QUANT_SIZES[wanted]
    return _Kind.F16 if tensor.shape[-1] % block else wanted


def _require_room(parameter: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    largest, limit = float(tensor.abs().max()), _LARGEST.get(kind)
    if limit is not None and largest > limit:
        raise ArtifactError(
            f"{parameter} holds {largest:.4g}, beyond {limit:.4g}, the largest value of {kind.name}; nothing was written. "
            "Use a form of wider precision, as merged-fp32 or merged-bf16."
        )
