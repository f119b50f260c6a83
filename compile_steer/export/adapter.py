"""A patch on disk: a stock PEFT folder for low-rank edits of Linears, a safetensors file for the rest.

Adapters are written as plain LoRA (alpha = rank with the scale in B, one rank that serving engines accept), because engines
misread the richer kinds without a word. No stock adapter format holds a bias on a Linear that has none, a change of full
rank, or another architecture: such a patch is kept in a file of our own until it is merged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.pytorch_utils import Conv1D

from compile_steer.artifacts.files import load_json, parse_header
from compile_steer.artifacts.provenance import CARD, Provenance
from compile_steer.artifacts.tensors import read_tensors, write_tensors
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import ArtifactError, brief, several
from compile_steer.formats.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, AdapterConfig, read_lora
from compile_steer.models.fingerprint import fingerprint
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

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
    """Write the patch, its provenance, its model card, and the `curves` (losses by what was trained) to `folder`.

    The provenance gets the fingerprint of the base with the patch on it in memory; verification compares it with that of
    the files. Raises `ArtifactError`, and writes nothing, where the patch holds NaN or infinity.
    """
    patch.require_finite()
    with with_patch(loaded.model, patch):
        provenance = replace(provenance, fingerprint=fingerprint(loaded.model, loaded))
    with new_folder(folder) as new:
        if is_adapter(patch, loaded):
            modules = [loaded.layout.model.get_submodule(name) for name in patch.low_rank]
            write_lora(new, patch.low_rank, loaded.loadable, any(isinstance(module, Conv1D) for module in modules))
        else:
            _write_patch_file(new / PATCH_FILE, patch)
        if curves:
            (new / CURVES).write_text(json.dumps(curves) + "\n", encoding="utf-8")
        provenance.write(new)
        (new / CARD).write_text(card, encoding="utf-8")


def is_adapter(patch: WeightPatch, loaded: LoadedModel) -> bool:
    """True if a plain LoRA holds the whole patch."""
    embeddings = set(loaded.layout.embeddings)
    rest = patch.bias or patch.dense or patch.config_flags or patch.untie or patch.architecture
    return not (rest or embeddings & set(patch.low_rank))


@dataclass(frozen=True)
class _PatchHeader:
    """What a patch has beside its tensors; see `WeightPatch`."""

    config_flags: tuple[str, ...]
    untie: bool
    architecture: str


def write_lora(folder: Path, edits: Mapping[str, LowRank], base: str, transposed: bool) -> None:
    """Write edits by the full name of their modules as plain LoRA: alpha = rank, and one rank that engines accept.

    Args:
        base: what the folder is to name as its base.
        transposed: the modules store [d_in, d_out], as GPT-2's do.
    """
    from peft import LoraConfig

    rank = _common_rank(edits)
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
    # PEFT keeps the modules as a set, in no fixed order; equal adapters must be equal files.
    path = folder / ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "target_modules": sorted(edits)}, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for name, edit in edits.items():
        full = edit.padded(rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = full.A.float().contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = full.B.float().contiguous().cpu()
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def _common_rank(edits: Mapping[str, LowRank]) -> int:
    """The one rank that engines read for all modules."""
    needed = max((edit.rank for edit in edits.values()), default=0)
    return next((r for r in _RANKS if r >= needed), needed)


def _write_patch_file(path: Path, patch: WeightPatch) -> None:
    """Biases as NAME.bias, whole changes as NAME.weight, low-rank edits as NAME.A and NAME.B; the rest as JSON under the
    metadata key `patch`."""
    tensors = {f"{name}.bias": bias for name, bias in patch.bias.items()}
    tensors |= {f"{name}.weight": delta for name, delta in patch.dense.items()}
    for name, edit in patch.low_rank.items():
        tensors |= {f"{name}.A": edit.A, f"{name}.B": edit.B}
    header = asdict(_PatchHeader(patch.config_flags, patch.untie, patch.architecture))
    # clone: factors may be views of one storage, which safetensors refuses
    tensors = {name: tensor.float().contiguous().cpu().clone() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"patch": json.dumps(header)})


def read_patch(folder: Path) -> WeightPatch:
    """The patch in a folder of ours, or in anybody's plain LoRA folder; raises `ArtifactError` for anything else."""
    path = folder / PATCH_FILE
    if not path.is_file():
        return WeightPatch(read_lora(folder).edits)
    tensors, metadata = read_tensors(path)
    header = parse_header(metadata, "patch", _PatchHeader, path, "Compile again.")
    factors = Counter(name[:-2] for name in tensors if name.endswith((".A", ".B")))
    other = [name for name in tensors if not name.endswith((".A", ".B", ".bias", ".weight"))]
    problems = [f"{path}: tensor {brief(name)} is no part of a patch." for name in other]
    problems += [f"{path}: {brief(name)} has only one of A and B." for name, count in factors.items() if count == 1]
    if problems:
        raise ArtifactError(several(problems))
    low_rank = {name: LowRank(tensors[f"{name}.B"], tensors[f"{name}.A"]) for name in factors}
    return WeightPatch(
        low_rank,
        {name.removesuffix(".bias"): tensor for name, tensor in tensors.items() if name.endswith(".bias")},
        header.config_flags,
        header.untie,
        header.architecture,
        {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if name.endswith(".weight")},
    )


def patch_provenance(
    name: str, backend: str, patch: WeightPatch, loaded: LoadedModel, program: Program, seconds: float
) -> Provenance:
    """The provenance of a patch of which neither recipe nor validation are known."""
    return Provenance(
        name=name,
        backend=backend,
        form="adapter" if is_adapter(patch, loaded) else "patch",
        model=loaded.id,
        revision=loaded.revision,
        program="",
        program_sha256=program.sha256,
        validation_sha256="",
        verdict="none",
        forced=False,
        recipe_sha256="",
        data_sha256={},
        seed=0,
        seconds=seconds,
        inputs="",
        chat=asdict(loaded.chat),
        described=program.describe(),
        architecture=patch.architecture or str(loaded.model.config.model_type),
        license=loaded.license,
        biases=len(patch.bias),
        rank=_common_rank(patch.low_rank) if is_adapter(patch, loaded) else 0,
    )


def read_curves(folder: Path) -> dict[str, dict[str, list[float]]]:
    """The losses that training left beside a patch's weights; none where nothing was trained."""
    path, kind = folder / CURVES, dict[str, dict[str, list[float]]]
    return load_json(path, kind, "record of losses", "Compile again.") if path.is_file() else {}


def base_named_in(folder: Path) -> str | None:
    """The base that a stock adapter names; None of other patches, which need ours to be loaded."""
    return AdapterConfig.read(folder).base_model_name_or_path if (folder / ADAPTER_CONFIG).is_file() else None
