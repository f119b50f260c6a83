"""Anybody's PEFT folder as plain LoRA: every scale in B, or every reason why that would be another adapter.

Serving engines read few of a LoRA's settings and some of them drop the others without a word. What is left here is
W <- W + B A and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.steering.low_rank import LowRank

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# What training or PEFT's own bookkeeping reads, and the adapter on disk does not depend on.
_BESIDE_THE_POINT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "velora_config",
}
_FOLDED = {"use_rslora", "alpha_pattern", "rank_pattern", "lora_alpha", "init_lora_weights", "bias"}
_MORE_THAN_LORA = MappingProxyType(
    {
        "use_dora": "DoRA scales every row of the sum of weight and adapter",
        "lora_bias": "the adapter has biases",
        "modules_to_save": "whole modules are replaced",
        "trainable_token_indices": "rows of the embeddings are replaced",
        "layer_replication": "the base's blocks are repeated",
        "target_parameters": "parameters that are no module's weight are edited",
        "alora_invocation_tokens": "the adapter is on only behind certain tokens",
        "arrow_config": "a router chooses between adapters",
        "use_qalora": "inputs are pooled before A",
        "use_bdlora": "the factors are block-diagonal",
        "kasa_config": "a diagonal stands between A and B, and the base is cut",
        "monteclora_config": "the factors are drawn at random",
    }
)
# These draw the first A and B and leave the base alone; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
_OWN_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_SHOWN = 8
_MERGE = "Merge it with PEFT (merge_and_unload), save that, and take the checkpoint."


@dataclass(frozen=True)
class PlainLora:
    """Edits by the full name of their modules, scales in B; `folded` says in words what was put there.

    `base` is what the adapter names as its base, '' where it names none; `transposed` that its modules store [d_in, d_out].
    """

    edits: Mapping[str, LowRank]
    folded: tuple[str, ...]
    base: str
    transposed: bool

    @property
    def max_rank(self) -> int:
        return max(edit.rank for edit in self.edits.values())


def read_lora(folder: Path) -> PlainLora:
    """The adapter at `folder` as plain LoRA, in fp32.

    Raises:
        ArtifactError: there is none, it is damaged, or it does more than plain LoRA; every reason is named.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    modules = sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))
    # What a setting brings along is not told a second time, tensor by tensor.
    problems = [*_beyond(config)] or [*_unpaired(tensors, modules)]
    if problems:
        raise ArtifactError([f"{folder}: {problem}" for problem in problems])
    edits, folded = {}, set()
    for module in modules:
        name = module.removeprefix(PREFIX)
        A, B = tensors[module + _A].float(), tensors[module + _B].float()
        rank, scale, how = _scale(name, config)
        problems += [f"{folder}: {name}: {problem}" for problem in _misfits(A, B, rank)]
        folded |= how
        edits[name] = LowRank(scale * B, A)
    if problems:
        raise ArtifactError(problems)
    base = config.get("base_model_name_or_path") or ""
    return PlainLora(edits, tuple(sorted(folded)), str(base), bool(config.get("fan_in_fan_out")))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{folder / ADAPTER_CONFIG} cannot be read ({error}); needed: a PEFT adapter's folder."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int) or config["r"] < 1:
        raise ArtifactError(f"{folder / ADAPTER_CONFIG} is no LoRA's: it has no rank r.")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / _PICKLE).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ArtifactError(
            f"{folder} holds {_PICKLE}, a pickle, which can run code. Load it with PEFT where you trust it, and save it again: "
            f"it becomes {ADAPTER_WEIGHTS}."
        )
    return read_tensors(folder / ADAPTER_WEIGHTS)[0]


def _beyond(config: Mapping[str, Any]) -> Iterator[str]:
    """Everything that makes the adapter more than plain LoRA on its base."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        yield f"peft_type is {kind}; needed: LORA. {_MERGE}"
    for key, value in sorted(config.items()):
        if key in _MORE_THAN_LORA and value:
            yield f"{key} is {value}: {_MORE_THAN_LORA[key]}. {_MERGE}"
        elif value and not {key} & (_BESIDE_THE_POINT | _FOLDED | _MORE_THAN_LORA.keys()):
            yield f"{key} is {value}, which is not known here. {_MERGE}"
    start = config.get("init_lora_weights", True)
    if start not in _OWN_BASE:
        yield (
            f"init_lora_weights is {start}: its base is not the model, but what {start} left of it. Save it again with "
            f"path_initial_model_for_weight_conversion, or: {_MERGE}"
        )


def _unpaired(tensors: Mapping[str, Tensor], modules: Sequence[str]) -> Iterator[str]:
    """Every tensor that is no half of a pair, or whose other half is not there."""
    pairs = {name + end for name in modules for end in (_A, _B)}
    odd = sorted(tensors.keys() ^ pairs)
    for name in odd[:_SHOWN]:
        missing = f"{name} is missing, its other half is there."
        yield missing if name in pairs else f"{name} is no half of a pair of lora_A and lora_B. {_MERGE}"
    if len(odd) > _SHOWN:
        yield f"{len(odd) - _SHOWN} more tensors like this."
    if not modules:
        yield "it holds no pair of lora_A and lora_B."


def _scale(name: str, config: Mapping[str, Any]) -> tuple[int, float, set[str]]:
    """(rank, factor on B A, what of it is no plain alpha / r) of a module, as PEFT computes them."""
    rank, own_rank = _of_module(name, config.get("rank_pattern"), config["r"])
    alpha, own_alpha = _of_module(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    rslora = bool(config.get("use_rslora"))
    told = {"use_rslora": rslora, "alpha_pattern": own_alpha, "rank_pattern": own_rank}
    return int(rank), alpha / (rank**0.5 if rslora else rank), {key for key, there in told.items() if there}


def _of_module(name: str, pattern: Mapping[str, float] | None, default: float) -> tuple[float, bool]:
    """What a pattern says of a module (a regular expression of its name's end), and whether it does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value, True
    return default, False


def _misfits(A: Tensor, B: Tensor, rank: int) -> Iterator[str]:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        yield f"lora_A is {list(A.shape)}, lora_B {list(B.shape)}; needed: [r, d_in] and [d_out, r]."
    elif A.shape[0] != rank:
        yield f"the factors have rank {A.shape[0]}, {ADAPTER_CONFIG} says {rank}."
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        yield "it holds NaN or infinity."
