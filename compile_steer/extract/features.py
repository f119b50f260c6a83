"""Directions that others have found: decoder rows of sparse autoencoders (SAELens), and features saved from Neuronpedia.

A SAELens folder holds `cfg.json` and `sae_weights.safetensors` with `W_dec` [d_sae, d]; a feature of Neuronpedia's
API is one JSON object with `vector` and `hookName`. Both name the one block that the feature is of.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compile_steer.directions import as_long_as
from compile_steer.errors import ArtifactError
from compile_steer.extract.found import Found
from compile_steer.layout import Layout
from compile_steer.program import Point, Site
from compile_steer.settings import Extract

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_HOOKS: dict[str, Point] = {
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


@dataclass(frozen=True)
class Feature:
    """One direction [d] for one site, and `others` [n, d] of the same kind, as controls."""

    site: Site
    vector: Tensor
    others: Tensor


def read(folder: Path, options: Extract, layout: Layout, seed: int) -> tuple[Point, Found]:
    """The feature's point, and its row as the direction of its block; every other block has none.

    The row keeps its own length. Controls are other rows of the same dictionary; where the file has one feature
    alone, its coordinates in another order.

    Raises:
        ArtifactError: the file is not there, not of these formats, or of another width or depth than the model.
    """
    path = folder / (options.file or "")
    generator = torch.Generator().manual_seed(seed)
    if path.suffix.lower() in _PICKLES:
        raise ArtifactError(_pickled(path))
    if path.is_dir():
        feature = _of_dictionary(path, options.index, options.shuffled, generator)
    else:
        feature = _of_json(path, options.index, options.shuffled, generator)
    _require_fit(path, feature, layout)
    layers = torch.zeros(layout.n_layers, layout.d_model)
    layers[feature.site.layer] = feature.vector
    others = torch.zeros(options.shuffled, layout.n_layers, layout.d_model)
    others[:, feature.site.layer] = feature.others
    return feature.site.point, Found(layers, as_long_as(others, layers))


def _of_dictionary(path: Path, index: int | None, count: int, generator: torch.Generator) -> Feature:
    config = _json(path / _CONFIG)
    weights = path / _WEIGHTS
    if not weights.is_file():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _PICKLES)
        raise ArtifactError(_pickled(path / pickles[0]) if pickles else f"{path} has no {_WEIGHTS} (SAELens).")
    if index is None:
        raise ArtifactError(f"{path} holds a whole dictionary; name the feature by extract.index.")
    # From SAELens 6 on, what is not the autoencoder's own is under 'metadata'.
    site = _site(path / _CONFIG, config.get("metadata", config).get("hook_name"))
    try:
        with safe_open(weights, framework="pt") as file:
            rows = file.get_slice("W_dec")
            size = rows.get_shape()[0]
            if not count < size or index >= size:
                raise ArtifactError(
                    f"{path} has {size} features; wanted are extract.index {index}, and {count} others as controls."
                )
            near = torch.randperm(size - 1, generator=generator)[:count].tolist()
            others = [rows[row + (row >= index)].float() for row in near]
            return Feature(site, rows[index].float(), torch.stack(others))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged, or has no 'W_dec' ({error}).") from error


def _of_json(path: Path, index: int | None, count: int, generator: torch.Generator) -> Feature:
    content = _json(path)
    if index is not None:
        raise ArtifactError(f"{path} is one feature; extract.index is for a SAELens folder.")
    vector = content.get("vector")
    if not isinstance(vector, list) or not vector:
        raise ArtifactError(
            f"{path} holds no vector (Neuronpedia leaves it out of many features); save the feature's row from its "
            "autoencoder: a SAELens folder and extract.index."
        )
    try:
        values = torch.tensor(vector, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: 'vector' must be a list of numbers.") from error
    others = [values[torch.randperm(len(values), generator=generator)] for _ in range(count)]
    return Feature(_site(path, content.get("hookName")), values, torch.stack(others))


def _site(path: Path, hook: object) -> Site:
    """The site of a TransformerLens hook; the input of block k > 0 is the output of block k - 1."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(\w+)", str(hook))
    if found is None or found[2] not in _HOOKS:
        raise ArtifactError(
            f"{path}: the feature is of '{hook}'; needed: blocks.K.hook_NAME, where NAME is one of {', '.join(_HOOKS)}."
        )
    layer, point = int(found[1]), _HOOKS[found[2]]
    return Site(layer - 1, "resid_post") if point == "resid_pre" and layer > 0 else Site(layer, point)


def _require_fit(path: Path, feature: Feature, layout: Layout) -> None:
    problems = []
    if feature.vector.shape != (layout.d_model,):
        problems.append(
            f"{path}: the feature has shape {list(feature.vector.shape)}; the model is {layout.d_model} wide."
        )
    if feature.site.layer >= layout.n_layers:
        problems.append(f"{path}: the feature is of block {feature.site.layer}; the model has {layout.n_layers}.")
    if not bool(torch.isfinite(feature.vector).all()) or float(feature.vector.norm()) == 0.0:
        problems.append(f"{path}: the feature is 0, or not finite; it steers nothing.")
    if problems:
        raise ArtifactError([*problems, "Use a feature of this very model."])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} cannot be read as JSON ({getattr(error, 'strerror', None) or error}); needed: a SAELens folder, or a "
            "feature's JSON as Neuronpedia gives it."
        ) from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is {type(content).__name__}; needed: one JSON object.")
    return content


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is read. Convert it where you trust it: "
        "torch.load(..., weights_only=True), then safetensors.torch.save_file with W_dec [features, width] as "
        f"{_WEIGHTS}, beside a {_CONFIG} with hook_name."
    )
