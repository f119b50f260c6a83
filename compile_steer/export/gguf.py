"""GGUF files for llama.cpp: a merged model (`-m`) or a LoRA beside its base (`--lora`).

Of a merged model the fp32 sum is rounded once. Matrices are stored as the form says; vectors (norms, biases) stay F32, so an
exact bias stays exact. A matrix whose rows are no whole number of blocks is F16, and in q4_0 the matrix that gives the
logits is Q8_0: as llama.cpp's own quantiser does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.artifacts.writing import new_file, new_folder
from compile_steer.common.errors import ArtifactError, CannotLower, brief, shell_word
from compile_steer.export.engine_support import GGUF_FILE
from compile_steer.export.gguf_tokenizer import tokenizer_fields
from compile_steer.export.merged import merged_model
from compile_steer.export.model_folder import patched_content
from compile_steer.models.gguf import ROPE_FACTORS, gemma3_scalar, write_and_close
from compile_steer.models.libraries import read_config
from compile_steer.models.load import LoadedModel
from compile_steer.models.source import gguf_of
from compile_steer.steering.patch import WeightPatch

_Kind = gguf.GGMLQuantizationType
GGUF_KINDS: Mapping[str, tuple[_Kind, gguf.LlamaFileType]] = {
    "f32": (_Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (_Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Kind.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# The largest value that each stores: half precision's, times what a block's scale is multiplied by.
_LARGEST = {_Kind.F16: 65504.0, _Kind.Q8_0: 127 * 65504.0, _Kind.Q4_0: 8 * 65504.0}
# transformers' family -> llama.cpp's architecture.
_ARCHITECTURES = {
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def config_refusals(config: PreTrainedConfig, folder: str = "FOLDER") -> list[str]:
    """Every reason why llama.cpp would not compute what transformers does from this config; empty where it would.

    `folder` is the merged one, for the command that llama.cpp's own script is run by.
    """
    family = config.model_type
    if family not in _ARCHITECTURES:
        return [
            f"GGUF files are written for {', '.join(sorted(_ARCHITECTURES))}; this model is of family {family}. If llama.cpp "
            f"knows it, its own script converts a merged folder: python convert_hf_to_gguf.py {shell_word(folder)} --outtype f16."
        ]
    if family == "gemma3_text":
        return _gemma3_refusals(config)
    problems = []
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ("default", "llama3") or (rope == "llama3" and family != "llama"):
        problems.append(f"GGUF: rope type '{rope}' of {family}; needed: default, or Llama 3's own of llama.")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (family == "mistral" and config.sliding_window is not None):
        problems.append(f"GGUF: the attention has a sliding window, which llama.cpp's graph of {family} leaves out.")
    if config.hidden_act != "silu":
        problems.append(
            f"GGUF: the MLP's activation is {config.hidden_act}; llama.cpp's graph of {family} computes silu."
        )
    if family == "qwen3" and config.attention_bias:
        problems.append("GGUF: the attention has biases, which llama.cpp's graph of qwen3 does not read.")
    return problems


def _gemma3_refusals(config: PreTrainedConfig) -> list[str]:
    """Where a config differs from what llama.cpp's graph of Gemma 3 has in its code, and no field of a file changes."""
    kinds = [f"{'full' if (n + 1) % 6 == 0 else 'sliding'}_attention" for n in range(config.num_hidden_layers)]
    default = {"rope_type": "default"}
    needed = {
        "layer_types": kinds,
        "query_pre_attn_scalar": gemma3_scalar(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "rope_parameters": {
            "full_attention": {**default, "rope_theta": config.rope_parameters["full_attention"]["rope_theta"]},
            "sliding_attention": {**default, "rope_theta": 10000.0},
        },
    }
    different = {
        key: getattr(config, key, None) for key, value in needed.items() if getattr(config, key, None) != value
    }
    return [
        f"GGUF: {key} is {brief(value)}; llama.cpp's graph of Gemma 3 has {brief(needed[key])}."
        for key, value in different.items()
    ]


class TensorNames:
    """How llama.cpp names and orders one model's tensors."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Raises `CannotLower` with every reason where llama.cpp would not compute the model of `config`."""
        problems = config_refusals(config)
        if problems:
            raise CannotLower(problems)
        kind = _ARCHITECTURES[config.model_type]
        self.architecture = gguf.MODEL_ARCH_NAMES[kind]
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """'model.layers.3.mlp.down_proj.weight' -> 'blk.3.ffn_down.weight'; raises `ArtifactError` for an unknown one."""
        name = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ArtifactError(f"llama.cpp's graph of {self.architecture} has no tensor for {parameter}.")
        return name

    def rows(self, parameter: str, tensor: Tensor) -> Tensor:
        """`tensor` [d_out, ...], a weight, bias or LoRA's B, with its rows in llama.cpp's order."""
        heads = self._heads.get(parameter.split(".")[-2])
        # Its llama graph rotates neighbouring rows of a head where transformers rotates halves; other graphs do not.
        if heads is None or self.architecture != "llama":
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)


def gguf_refusals(patch: WeightPatch, loaded: LoadedModel) -> list[str]:
    """Why the base with `patch` cannot be written as GGUF; empty where it can. Nothing is computed."""
    loaded.require_resident("writing GGUF")
    config = read_config(patched_content(Path(loaded.source), patch))
    problems = config_refusals(config)
    if gguf_of(loaded.id) is None:  # a base that is a GGUF file itself has its tokenizer's fields copied
        try:
            tokenizer_fields(loaded, config.vocab_size)
        except CannotLower as error:
            problems += error.problems
    return problems


def write_gguf(
    folder: Path, patch: WeightPatch, loaded: LoadedModel, precision: str, provenance: Provenance, card: str
) -> None:
    """Write the merged model at `precision` (see `GGUF_KINDS`) to `folder`/model.gguf, with its provenance and card.

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
    fields = tokenizer_fields(loaded, model.config.vocab_size)
    names = TensorNames(model.config)
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(GGUF_KINDS[precision][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_settings(writer, model.config)
    for field in fields:
        writer.add_key_value(*field)
    for parameter, tensor in model.named_parameters():  # without a tied head
        stored_as = names.name(parameter)
        gives_logits = stored_as == ("token_embd.weight" if model.config.tie_word_embeddings else "output.weight")
        kind = _kind(tensor, precision, gives_logits)
        largest, limit = float(tensor.abs().max()), _LARGEST.get(kind, math.inf)
        if largest > limit:  # the cast would give infinity
            raise ArtifactError(
                f"{parameter} holds {largest:.4g}, beyond {limit:.4g}, the largest value of {kind.name}; nothing was "
                "written. Use a form of wider precision, as merged-fp32 or merged-bf16."
            )
        # Of Gemma's norm weights transformers keeps what exceeds 1.
        above = 1.0 if names.architecture == "gemma3" and parameter.endswith("norm.weight") else 0.0
        values = (names.rows(parameter, tensor).float() + above).contiguous().numpy()
        writer.add_tensor(stored_as, gguf.quantize(values, kind), raw_dtype=kind)
    if model.config.rope_parameters.get("rope_type") == "llama3":
        # What llama.cpp divides the unscaled frequencies by to get the model's own, [d_head / 2].
        own = model.base_model.rotary_emb.inv_freq.double()
        exponents = torch.arange(len(own), dtype=torch.float64) / len(own)
        factors: Tensor = model.config.rope_parameters["rope_theta"] ** -exponents / own
        writer.add_tensor(ROPE_FACTORS, factors.float().numpy())
    write_and_close(writer)


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
    ropes = config.rope_parameters
    writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _kind(tensor: Tensor, precision: str, gives_logits: bool) -> gguf.GGMLQuantizationType:
    if tensor.ndim < 2:
        return _Kind.F32
    kind = _Kind.Q8_0 if gives_logits and precision == "q4_0" else GGUF_KINDS[precision][0]
    block, _bytes = gguf.GGML_QUANT_SIZES[kind]  # values that share one scale
    return _Kind.F16 if tensor.shape[-1] % block else kind


def write_lora_gguf(path: Path, patch: WeightPatch, config: PreTrainedConfig) -> None:
    """Write `patch` as a LoRA file for a base of `config`, as a whole or not at all.

    F32 pairs NAME.lora_a [r, d_in] and NAME.lora_b [d_out, r] under llama.cpp's names; alpha is the rank, so that the
    engine's scale alpha / r is 1.

    Raises:
        CannotLower: llama.cpp would not compute what transformers does from `config`.
        ArtifactError: the patch is no plain LoRA, or edits what llama.cpp's graph has no such file for.
    """
    names = TensorNames(config)
    rest = {"biases": patch.bias, "whole weights": patch.dense, "another architecture": patch.architecture}
    problems = [f"a LoRA file cannot hold {name}; merge the patch." for name, present in rest.items() if present]
    # llama.cpp has no tensor of a tied head to add to, and reads an embedding's factors the other way round.
    ends = ("embed_tokens", "lm_head") if config.tie_word_embeddings else ("embed_tokens",)
    refused = [name for name in patch.low_rank if name.endswith(ends)]
    problems += [f"a LoRA file for llama.cpp cannot edit {name}; merge the patch." for name in refused]
    if not patch.low_rank:
        problems.append("the patch edits nothing; a LoRA file needs pairs of factors.")
    if problems:
        raise ArtifactError(problems)
    rank = patch.max_rank
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, names.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for module, edit in patch.low_rank.items():
            parameter = f"{module}.weight"
            full = edit.padded(rank)  # the file has one alpha, so one rank
            for half, matrix in (("lora_a", full.A), ("lora_b", names.rows(parameter, full.B))):
                values = matrix.detach().float().cpu().contiguous().numpy()
                writer.add_tensor(f"{names.name(parameter)}.{half}", values)
        write_and_close(writer)
