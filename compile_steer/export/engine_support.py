"""What each engine's own code reads of a model, where it drops or refuses what stock transformers computes.

Read off the sources of llama.cpp (as llama-cpp-python 0.3.36 has it) and vLLM 0.32, and tried where docs/ENGINES.md says so.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from transformers import PreTrainedConfig

from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.steering.layout import FAMILIES

EngineName = Literal["transformers", "vllm", "llama.cpp"]
ENGINE_NAMES: tuple[EngineName, ...] = get_args(EngineName)

PLUGIN = "vllm-lens"
"""What adds vectors to activations in vLLM, which by itself cannot."""

_MAX_VLLM_RANK = 512
# Graphs that add a bias behind o_proj and down_proj; the others have no tensor for it, and a file that holds one is refused.
_LLAMA_CPP_BIASES = ("llama", "granite", "gpt2", "gpt_neox", "phi", "gpt_oss")
# o_proj is built with bias=False whatever the config says, and a bias that has no place is skipped without a word.
_VLLM_NO_BIAS = ("qwen3", "qwen3_moe")
_VLLM_NO_LORA = ("gpt2",)


def reads_biases(engine: EngineName, family: str) -> bool:
    """True if an engine's code of that family adds the biases that stock transformers can give its writers."""
    match engine:
        case "llama.cpp":
            return family in _LLAMA_CPP_BIASES
        case "vllm":
            return family not in _VLLM_NO_BIAS
    return True


def checkpoint_refusals(engine: EngineName, config: PreTrainedConfig, weights: Checkpoint) -> list[str]:
    """Why an engine would not compute what a checkpoint says; empty where it would, or where nothing is known."""
    family = str(config.model_type)
    biased = [] if reads_biases(engine, family) else _biased_writers(family, weights)
    if not biased:
        return []
    return [
        f"{biased[0]} is not zero{f', nor are {len(biased) - 1} more' if len(biased) > 1 else ''}, and {engine}'s {family} has "
        f"no place for it: the model would run without the steering. Compile to an adapter (closed_form or distill), or serve "
        "with transformers."
    ]


def _biased_writers(family: str, weights: Checkpoint) -> list[str]:
    """The biases of the checkpoint that its writers add, by name; those that are zero add nothing."""
    known = FAMILIES.get(family)
    if known is None:
        return []
    ends = (f".{known.attn}.bias", f".{known.mlp}.bias")
    found = []
    for name in sorted(weights.files):
        if name.endswith(ends):
            tensor = weights.tensor(name)
            if tensor is not None and bool(torch.count_nonzero(tensor)):
                found.append(name)
    return found


def adapter_refusals(engine: EngineName, family: str | None, rank: int) -> list[str]:
    """Why an engine takes no plain LoRA of that rank.

    Args:
        family: of the base, None where it is not known.
    """
    problems = []
    if engine == "vllm" and rank > _MAX_VLLM_RANK:
        problems.append(
            f"rank {rank}; vLLM takes up to {_MAX_VLLM_RANK}. Merge it, or cut it: 'compile-steer task-vector --cut'."
        )
    if engine == "vllm" and family in _VLLM_NO_LORA:
        problems.append(f"vLLM's {family} takes no adapters. Merge it, and export the checkpoint.")
    return problems
