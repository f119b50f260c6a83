"""Features of sparse autoencoders: a row of a SAELens decoder, or one that was saved from Neuronpedia.

A SAELens folder holds `cfg.json` and `sae_weights.safetensors` with `W_dec` [d_sae, d]; a feature of Neuronpedia's
API is one JSON object with `vector` and `hookName`. Both name the one block that the feature is of.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import NUMBER, Foreign, Given, numbers, other_rows, read_json
from compile_steer.formats.pickles import OBJECTS, TENSORS
from compile_steer.steering.sites import Point, Site

CONFIG = "cfg.json"
_WEIGHTS = "sae_weights.safetensors"
_HOOKS: dict[str, Point] = {
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
}


def read_saelens(path: Path, given: Given) -> Foreign:
    """Row `given.index` of the decoder, and other rows as controls; raises `ArtifactError`."""
    config = read_json(path / CONFIG, "a SAELens configuration")
    weights = path / _WEIGHTS
    if not weights.is_file():
        pickles = sorted(file for file in path.iterdir() if file.suffix.lower() in (*TENSORS, *OBJECTS))
        raise ArtifactError(_pickled(pickles[0]) if pickles else f"{path} has no {_WEIGHTS} (SAELens).")
    # From SAELens 6 on, what is not the autoencoder's own is under 'metadata'.
    about = config.get("metadata", config)
    site = _site(path / CONFIG, about.get("hook_name") if isinstance(about, dict) else None)
    try:
        with safe_open(weights, framework="pt") as file:
            rows = file.get_slice("W_dec")
            near = other_rows(path, rows.get_shape()[0], given)
            others = torch.stack([rows[row].float() for row in near])
            return Foreign({site.layer: rows[given.index].float()}, site.point, others)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged, or has no 'W_dec' ({error}).") from error


def read_neuronpedia(path: Path, _given: Given) -> Foreign:
    """The feature's vector; raises `ArtifactError` where the file has none."""
    content = read_json(path, "a feature's JSON as Neuronpedia gives it")
    vector = content.get("vector")
    if not vector:
        raise ArtifactError(
            f"{path} holds no vector (Neuronpedia leaves it out of many features); save the feature's row from its "
            "autoencoder: a SAELens folder and extract.imported.index."
        )
    site = _site(path, content.get("hookName"))
    return Foreign(
        {site.layer: numbers(path, "'vector'", vector)}, site.point, made_for=str(content.get("modelId", ""))
    )


def _site(path: Path, hook: object) -> Site:
    """The site of a TransformerLens hook; the input of block k > 0 is the output of block k - 1."""
    found = re.fullmatch(rf"blocks\.{NUMBER}\.hook_(\w+)", str(hook))
    if found is None or found[2] not in _HOOKS:
        raise ArtifactError(
            f"{path}: the feature is of '{hook}'; needed: blocks.K.hook_NAME, where NAME is one of {', '.join(_HOOKS)}."
        )
    layer, point = int(found[1]), _HOOKS[found[2]]
    return Site(layer - 1, "resid_post") if point == "resid_pre" and layer > 0 else Site(layer, point)


def _pickled(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is read. Convert it where you trust it: "
        "torch.load(..., weights_only=True), then safetensors.torch.save_file with W_dec [features, width] as "
        f"{_WEIGHTS}, beside a {CONFIG} with hook_name."
    )
