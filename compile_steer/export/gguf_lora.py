"""A low-rank patch as the LoRA file that llama.cpp loads beside a base (`--lora`)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig

from compile_steer.artifacts.files import new_file
from compile_steer.common.errors import ArtifactError
from compile_steer.export.llama_cpp import Arrangement
from compile_steer.models.gguf import write_out
from compile_steer.steering.patch import WeightPatch


def write_lora_gguf(path: Path, patch: WeightPatch, config: PreTrainedConfig) -> None:
    """Write `patch` for a base of `config`, as a whole or not at all; `read_patch` gives that of an adapter's folder.

    F32 pairs NAME.lora_a [r, d_in] and NAME.lora_b [d_out, r] under llama.cpp's names; alpha is the rank, so that the
    engine's scale alpha / r is 1.

    Raises:
        CannotLower: llama.cpp would not compute what transformers does from `config`.
        ArtifactError: the patch is no plain LoRA, or edits what llama.cpp's graph has no such file for.
    """
    arrangement = Arrangement.of(config)
    _require_plain(patch, config)
    rank = patch.max_rank
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arrangement.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for module, edit in patch.low_rank.items():
            parameter = f"{module}.weight"
            name, full = arrangement.name(parameter), edit.padded(rank)
            writer.add_tensor(f"{name}.lora_a", _values(full.A))
            writer.add_tensor(f"{name}.lora_b", _values(arrangement.rows(parameter, full.B)))
        write_out(writer)


def _values(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy()


def _require_plain(patch: WeightPatch, config: PreTrainedConfig) -> None:
    """Raise `ArtifactError` with everything that the file cannot hold."""
    rest = {"biases": patch.bias, "whole weights": patch.dense, "another architecture": patch.architecture}
    problems = [f"a LoRA file cannot hold {what}; merge the patch." for what, there in rest.items() if there]
    # llama.cpp has no tensor of a tied head to add to, and reads an embedding's factors the other way round.
    ends = ("embed_tokens", "lm_head") if config.tie_word_embeddings else ("embed_tokens",)
    problems += [
        f"a LoRA file for llama.cpp cannot edit {name}; merge the patch."
        for name in patch.low_rank
        if name.endswith(ends)
    ]
    if not patch.low_rank:
        problems.append("the patch edits nothing; a LoRA file needs pairs of factors.")
    if problems:
        raise ArtifactError(problems)
