"""A patch on disk: a stock PEFT folder for low-rank edits of Linears, a safetensors file for the rest.

Adapters are written normalised (plain LoRA, alpha = rank with the scale in B, one rank that serving
engines accept), because engines misread the richer kinds without a word. No stock adapter format holds
a bias on a Linear that has none, a change of full rank, or another architecture: such a patch is kept beside its
provenance until it is merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from compile_steer.artifacts.files import new_folder
from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import fingerprint
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch

PATCH_FILE = "patch.safetensors"
CURVES = "training.json"
# Ranks that vLLM takes; llama.cpp and PEFT take any.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_patch(
    folder: Path,
    patch: WeightPatch,
    loaded: LoadedModel,
    provenance: Provenance,
    card: str,
    curves: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the patch, its provenance and its model card to `folder`, as a whole or not at all.

    The provenance says what the base computes with the patch on it here and now, so that what is read back can be held
    against it.

    Args:
        curves: losses by what was trained, kept beside the weights.
    """
    patch.require_finite()
    with with_patch(loaded.model, patch):
        computes = fingerprint(loaded.model, loaded)
    with new_folder(folder) as new:
        if is_adapter(patch, loaded):
            _write_peft(new, patch, loaded)
        else:
            _write_parts(new / PATCH_FILE, patch)
        if curves:
            (new / CURVES).write_text(json.dumps(curves) + "\n", encoding="utf-8")
        replace(provenance, fingerprint=computes).write(new)
        (new / CARD).write_text(card, encoding="utf-8")


def is_adapter(patch: WeightPatch, loaded: LoadedModel) -> bool:
    """True if a plain LoRA holds the whole patch."""
    embeddings = set(loaded.layout.family.embeddings)
    rest = patch.bias or patch.dense or patch.config_flags or patch.untie or patch.architecture
    return not (rest or embeddings & set(patch.low_rank))


def _write_parts(path: Path, patch: WeightPatch) -> None:
    """Biases as NAME.bias, whole changes as NAME.weight, low-rank edits as NAME.A and NAME.B, the rest as JSON
    under metadata key `patch`."""
    tensors = {f"{name}.bias": bias for name, bias in patch.bias.items()}
    tensors |= {f"{name}.weight": delta for name, delta in patch.dense.items()}
    for name, edit in patch.low_rank.items():
        tensors |= {f"{name}.A": edit.A, f"{name}.B": edit.B}
    header = {"config_flags": list(patch.config_flags), "untie": patch.untie, "architecture": patch.architecture}
    # clone: factors may be views of each other's storage
    whole = {name: tensor.float().contiguous().cpu().clone() for name, tensor in tensors.items()}
    save_file(whole, str(path), metadata={"patch": json.dumps(header)})


def _read_parts(path: Path) -> WeightPatch:
    tensors, metadata = read_tensors(path)
    try:
        header = json.loads(metadata["patch"])
        low_rank = {
            n[:-2]: LowRank(tensors[f"{n[:-2]}.B"], tensor) for n, tensor in tensors.items() if n.endswith(".A")
        }
        biases = {n.removesuffix(".bias"): tensor for n, tensor in tensors.items() if n.endswith(".bias")}
        dense = {n.removesuffix(".weight"): tensor for n, tensor in tensors.items() if n.endswith(".weight")}
        return WeightPatch(
            low_rank, biases, tuple(header["config_flags"]), bool(header["untie"]), header["architecture"], dense
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is not a patch of compile_steer.") from error


def _write_peft(folder: Path, patch: WeightPatch, loaded: LoadedModel) -> None:
    modules = [loaded.layout.model.get_submodule(name) for name in patch.low_rank]
    write_lora(folder, patch.low_rank, loaded.id, any(isinstance(module, Conv1D) for module in modules))


def write_lora(folder: Path, edits: Mapping[str, LowRank], base: str, transposed: bool) -> None:
    """Write edits by the full name of their modules as plain LoRA: alpha = rank, and one rank that engines accept.

    Args:
        base: what the folder is to name as its base.
        transposed: the modules store [d_in, d_out], as GPT-2's do.
    """
    needed = max(edit.rank for edit in edits.values())
    rank = next((r for r in _RANKS if r >= needed), needed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(edits),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    # PEFT keeps the modules as a set: equal adapters must be equal files.
    path = folder / ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "target_modules": sorted(edits)}, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, edit in edits.items():
        full = edit.padded(rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = full.A.float().contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = full.B.float().contiguous().cpu()
    save_file(tensors, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})


def read_patch(folder: Path) -> WeightPatch:
    """Read back a patch that `write_patch` wrote; raises `ArtifactError` for anything else."""
    if (folder / PATCH_FILE).is_file():
        return _read_parts(folder / PATCH_FILE)
    tensors, _metadata = read_tensors(folder / ADAPTER_WEIGHTS)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config["lora_alpha"] != config["r"]:
            raise ArtifactError(
                f"{folder}: alpha {config['lora_alpha']} differs from rank {config['r']}; not one of ours."
            )
        names = sorted(key[len(PREFIX) : -len(".lora_A.weight")] for key in tensors if key.endswith(".lora_A.weight"))
        pairs = {n: (tensors[f"{PREFIX}{n}.lora_B.weight"], tensors[f"{PREFIX}{n}.lora_A.weight"]) for n in names}
    except (OSError, KeyError, ValueError) as error:
        raise ArtifactError(f"{folder} is not a PEFT adapter that compile_steer wrote ({error}).") from error
    if not names or 2 * len(names) != len(tensors):
        raise ArtifactError(f"{folder / ADAPTER_WEIGHTS} does not hold pairs of lora_A and lora_B; compile again.")
    return WeightPatch({name: LowRank(B, A) for name, (B, A) in pairs.items()})


def kept_patch(folder: Path, inputs: str) -> WeightPatch | None:
    """The patch on disk, if it is as it was written, and was made from the same inputs."""
    try:
        return read_patch(folder) if Provenance.read_unedited(folder).inputs == inputs else None
    except ArtifactError:
        return None
