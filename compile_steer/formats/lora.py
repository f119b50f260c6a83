"""Any PEFT folder as plain LoRA, W <- W + B A with every scale in B; or every reason why that is impossible.

Serving engines read few of a LoRA's settings, and some of them ignore the others without a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor

from compile_steer.artifacts.files import load_foreign_json, read_json
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError, brief, several
from compile_steer.models.adapter_patterns import require_quick_patterns
from compile_steer.steering.low_rank import LowRank

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# Settings that training or PEFT's bookkeeping reads, and on which the saved adapter does not depend.
# fmt: off
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "task_type", "velora_config",
}
# fmt: on
# Settings that `read_lora` reads. ('bias' says which of the base's biases were trained; they would be tensors.)
_READ = {
    "use_rslora",
    "alpha_pattern",
    "rank_pattern",
    "lora_alpha",
    "init_lora_weights",
    "bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}  # fmt: skip
_MORE_THAN_LORA = {
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
# Initialisations that leave the base alone; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# PEFT's prefix, once, and a name that a module of torch can have.
_NAME = re.compile(r"base_model\.model\.((?!base_model\.)[\w-]+(?:\.[\w-]+)*)")
_LEFT_OUT = (
    "but target_modules, exclude_modules and layers_to_transform leave it out: PEFT would ignore them. Name it there, or take its "
    "tensors out."
)
_MERGE = "Merge it with PEFT (merge_and_unload), save that, and use the checkpoint."


@dataclass(frozen=True)
class PlainLora:
    """An adapter without settings."""

    edits: Mapping[str, LowRank]  # by the full name of their module, with the scale in B
    folded: tuple[str, ...]  # the settings whose effect is now in B
    base: str  # the base that the adapter names, '' if none
    transposed: bool  # whether its modules store their weights as [d_in, d_out]

    @property
    def max_rank(self) -> int:
        return max(edit.rank for edit in self.edits.values())


_Rank = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the `adapter_config.json` of any adapter of PEFT says of its base."""

    base_model_name_or_path: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises `ArtifactError` where there is none, or one of another kind."""
        return load_foreign_json(folder / ADAPTER_CONFIG, cls, f"the {cls.__name__} of an adapter that PEFT saved")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """The settings of a LoRA that are read here, in PEFT's names and with its defaults."""

    r: _Rank
    lora_alpha: float = 8
    use_rslora: bool | None = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    fan_in_fan_out: bool | None = False
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


def read_lora(folder: Path) -> PlainLora:
    """Read the adapter at `folder` as plain LoRA, in fp32.

    Raises `ArtifactError` with every reason if it does not exist, is damaged, or does more than plain LoRA.
    """
    config, settings = LoraConfig.read(folder), read_json(folder / ADAPTER_CONFIG, "")
    if (folder / _PICKLE).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise ArtifactError(
            f"{folder} holds {_PICKLE}, a pickle, which can run code. Load it with PEFT where you trust it, and save it again: "
            f"it becomes {ADAPTER_WEIGHTS}."
        )
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)[0]
    modules = sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))
    # The tensors that an unsupported setting adds are not reported again one by one.
    problems = [*_unsupported_settings(settings)] or several([*_unpaired_tensors(tensors, modules)])
    if problems:
        raise ArtifactError([f"{folder}: {problem}" for problem in problems])
    names = [module.removeprefix(PREFIX) for module in modules]
    require_quick_patterns(folder / ADAPTER_CONFIG, settings, names)
    edits, folded = {}, set()
    problems = [f"{folder}: {name} has factors, {_LEFT_OUT}" for name in _left_out(names, config)]
    for module, name in zip(modules, names, strict=True):
        where, held = f"{folder}: {name}", (tensors[module + _A], tensors[module + _B])
        if not all(factor.is_floating_point() for factor in held):
            problems.append(f"{where}: the factors are no floats.")
            continue
        A, B = (factor.float() for factor in held)
        rank, scale, used = _scale(name, config)
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not (A.numel() and B.numel()):
            shapes = f"lora_A is {list(A.shape)}, lora_B {list(B.shape)}"
            problems.append(f"{where}: {shapes}; needed: [r, d_in] and [d_out, r].")
        elif A.shape[0] != rank:
            problems.append(f"{where}: the factors have rank {A.shape[0]}, {ADAPTER_CONFIG} says {rank}.")
        # No entry of the scaled B, of A or of B A is larger than this. (NaN comes first in max, or it would be lost.)
        size = max(abs(scale), 1.0) * math.prod(max(float(factor.double().norm()), 1.0) for factor in (B, A))
        if not size < torch.finfo(torch.float32).max:
            problems.append(f"{where}: it holds NaN or infinity, or what float32 cannot hold once it is multiplied.")
        folded |= used
        edits[name] = LowRank(scale * B, A)
    if problems:
        raise ArtifactError(several(problems))
    return PlainLora(edits, tuple(sorted(folded)), config.base_model_name_or_path or "", bool(config.fan_in_fan_out))


def _unsupported_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Every setting that makes the adapter more than plain LoRA on its base."""
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        yield f"peft_type is {kind}; needed: LORA. {_MERGE}"
    for key, value in sorted(config.items()):
        if key in _MORE_THAN_LORA and value:
            yield f"{key} is {value}: {_MORE_THAN_LORA[key]}. {_MERGE}"
        elif value and key not in _IGNORED | _READ | _MORE_THAN_LORA.keys():
            yield f"{key} is {value}, a setting that is not supported. {_MERGE}"
    if not config.get("target_modules"):
        yield "target_modules names no modules; needed: the names of those that have factors."
    start = config.get("init_lora_weights", True)
    if start not in _BASE_UNCHANGED:
        yield (
            f"init_lora_weights is {start}: its base is not the model, but what {start} left of it. Save it again with "
            f"path_initial_model_for_weight_conversion, or: {_MERGE}"
        )


def _unpaired_tensors(tensors: Mapping[str, Tensor], modules: list[str]) -> Iterator[str]:
    """Every tensor that is not one of a pair of lora_A and lora_B."""
    pairs = {name + suffix for name in modules for suffix in (_A, _B)}
    for name in modules:
        if not _NAME.fullmatch(name):
            yield f"{brief(name)} is not {PREFIX} and the name of a module: PEFT would ignore its factors."
    unpaired = sorted(tensors.keys() ^ pairs)
    for name in unpaired:
        if name in pairs:
            yield f"{name} is missing; the other tensor of its pair is there."
        else:
            yield f"{name} is not one of a pair of lora_A and lora_B. {_MERGE}"
    if not modules:
        yield "it holds no pair of lora_A and lora_B."


def _left_out(names: list[str], config: LoraConfig) -> list[str]:
    """The modules that PEFT, by its own rule, would not adapt; it would ignore their tensors without an error."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if str(config.target_modules).lower() == "all-linear":
        return []
    return [name for name in names if not check_target_module_exists(config, name)]


def _scale(name: str, config: LoraConfig) -> tuple[int, float, set[str]]:
    """A module's rank, its factor on B A, and the settings that make this more than alpha / r; as PEFT computes them."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    # PEFT's own rule of which pattern's key is the module's; the name itself where none is.
    own_rank, own_alpha = get_pattern_key(ranks, name), get_pattern_key(alphas, name)
    rank, alpha = ranks.get(own_rank, config.r), alphas.get(own_alpha, config.lora_alpha)
    rslora = bool(config.use_rslora)
    used = {"use_rslora": rslora, "alpha_pattern": own_alpha in alphas, "rank_pattern": own_rank in ranks}
    return rank, alpha / (rank**0.5 if rslora else rank), {key for key, is_used in used.items() if is_used}
