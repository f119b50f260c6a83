"""How llama.cpp names and arranges the tensors of a transformers model, and which models it computes alike.

Its llama graph rotates neighbouring rows of a head where transformers rotates halves. So the rows of query and key are
interleaved on their way into a GGUF file, in weights, biases and the B of a LoRA alike; those of other graphs are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
from torch import Tensor
from transformers import PreTrainedConfig

from compile_steer.common.errors import ArtifactError, CannotLower

# transformers' family -> llama.cpp's architecture.
_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def refusals(config: PreTrainedConfig) -> list[str]:
    """Every reason why llama.cpp would not compute what transformers does from this config; empty where it would."""
    family = config.model_type
    if family not in _ARCHITECTURES:
        return [f"GGUF files are written for {', '.join(sorted(_ARCHITECTURES))}; this model is of family {family}."]
    return list(_unlike(config))


def _unlike(config: PreTrainedConfig) -> Iterator[str]:
    family = config.model_type
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ("default", "llama3") or (rope == "llama3" and family != "llama"):
        yield f"GGUF: rope type '{rope}' of {family}; needed: default, or Llama 3's own of llama."
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (family == "mistral" and config.sliding_window is not None):
        yield f"GGUF: the attention has a sliding window, which llama.cpp's graph of {family} leaves out."
    if config.hidden_act != "silu":
        yield f"GGUF: the MLP's activation is {config.hidden_act}; llama.cpp's graph of {family} computes silu."
    if family == "qwen3" and config.attention_bias:
        yield "GGUF: the attention has biases, which llama.cpp's graph of qwen3 does not read."


@dataclass(frozen=True)
class Arrangement:
    """One model's tensors as llama.cpp has them."""

    architecture: str
    n_heads: int
    n_key_heads: int
    names: gguf.TensorNameMap

    @staticmethod
    def of(config: PreTrainedConfig) -> Arrangement:
        """The arrangement of a model of `config`; raises `CannotLower` with every reason where there is none."""
        problems = refusals(config)
        if problems:
            raise CannotLower(problems)
        kind = _ARCHITECTURES[config.model_type]
        return Arrangement(
            gguf.MODEL_ARCH_NAMES[kind],
            config.num_attention_heads,
            config.num_key_value_heads,
            gguf.get_tensor_name_map(kind, config.num_hidden_layers),
        )

    def name(self, parameter: str) -> str:
        """'model.layers.3.mlp.down_proj.weight' -> 'blk.3.ffn_down.weight'; raises `ArtifactError` for what it has not."""
        found = self.names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArtifactError(f"llama.cpp's graph of {self.architecture} has no tensor for {parameter}.")
        return found

    def rows(self, parameter: str, tensor: Tensor) -> Tensor:
        """`tensor` [d_out, ...] with its rows in llama.cpp's order."""
        module = parameter.rpartition(".")[0]
        heads = {"q_proj": self.n_heads, "k_proj": self.n_key_heads}.get(module.rpartition(".")[2])
        if heads is None or self.architecture != "llama":
            return tensor
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)
