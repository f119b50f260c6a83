"""Directions out of a dictionary: rows of a SAELens decoder, features of Neuronpedia, concepts of AxBench.

A SAELens folder holds `cfg.json` and `sae_weights.safetensors` with `W_dec` [d_sae, d_model]. A feature of Neuronpedia's
API is one JSON object with `vector` and `hookName`. AxBench saves [n_concepts, d_model] by `torch.save`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import (
    BLOCK_NUMBER,
    PICKLE_SUFFIXES,
    SAELENS_CONFIG,
    TORCH_SUFFIXES,
    ForeignVectors,
    ImportOptions,
    choose_other_rows,
    parse_numbers,
    read_json,
)
from compile_steer.formats.tensors import read_floats, wrong_shape
from compile_steer.steering.sites import POINTS, Site

_SAELENS_WEIGHTS = "sae_weights.safetensors"


def read_saelens(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read row `options.index` of the decoder, and other rows as controls; raises `ArtifactError`."""
    config = read_json(path / SAELENS_CONFIG, "a SAELens configuration")
    weights = path / _SAELENS_WEIGHTS
    if not weights.is_file():
        pickles = sorted(f for f in path.iterdir() if f.suffix.lower() in (*TORCH_SUFFIXES, *PICKLE_SUFFIXES))
        if not pickles:
            raise ArtifactError(f"{path} has no {_SAELENS_WEIGHTS} (SAELens).")
        raise ArtifactError(
            f"{pickles[0]} is a pickle, which can run code when it is read. If you trust it, convert it: "
            "torch.load(..., weights_only=True), then safetensors.torch.save_file with W_dec [features, width] as "
            f"{_SAELENS_WEIGHTS}, beside a {SAELENS_CONFIG} with hook_name."
        )
    metadata = config.get("metadata", config)  # from SAELens 6 on, the hook is under 'metadata'
    site = _site_of_hook(path / SAELENS_CONFIG, metadata.get("hook_name") if isinstance(metadata, dict) else None)
    try:
        with safe_open(weights, framework="pt") as file:
            decoder = file.get_slice("W_dec")  # a row at a time: a decoder can have gigabytes
            controls = choose_other_rows(path, decoder.get_shape()[0], options)
            others = torch.stack([decoder[row].float() for row in controls])
            return ForeignVectors({site.layer: decoder[options.index].float()}, site.point, others)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged, or has no 'W_dec' ({error}).") from error


def read_neuronpedia(path: Path, _options: ImportOptions) -> ForeignVectors:
    """Read the feature's vector; raises `ArtifactError` if the file has none."""
    content = read_json(path, "a feature's JSON as Neuronpedia gives it")
    if not content.get("vector"):
        raise ArtifactError(
            f"{path} holds no vector (Neuronpedia leaves it out of many features); save the feature's row from its "
            "autoencoder: a SAELens folder and extract.imported.index."
        )
    site = _site_of_hook(path, content.get("hookName"))
    vector = parse_numbers(path, "'vector'", content["vector"])
    return ForeignVectors({site.layer: vector}, site.point, made_for=str(content.get("modelId", "")))


def read_axbench(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read row `options.index`, for the output of block `options.layer`, and other rows as controls.

    Raises:
        ArtifactError: the block or the row is not specified, or the tensor is something else.
    """
    rows = read_floats(path)
    if rows.ndim != 2:
        raise wrong_shape(path, rows, options, "[n_concepts, d_model]")
    others = rows[choose_other_rows(path, len(rows), options)].float()
    if options.layer is None:
        raise ArtifactError(f"{path} does not say its block. Set extract.imported.layer (--layer).")
    return ForeignVectors({options.layer: rows[options.index].float()}, others=others)


def _site_of_hook(path: Path, hook: object) -> Site:
    """The site of a TransformerLens hook point."""
    match = re.fullmatch(rf"blocks\.{BLOCK_NUMBER}\.hook_({'|'.join(POINTS)})", str(hook))
    if match is None:
        raise ArtifactError(
            f"{path}: the feature is of '{hook}'; needed: blocks.K.hook_NAME, where NAME is one of {', '.join(POINTS)}."
        )
    layer, point = int(match[1]), next(point for point in POINTS if point == match[2])
    # The input of block k > 0 is the output of block k - 1.
    return Site(layer - 1, "resid_post") if point == "resid_pre" and layer > 0 else Site(layer, point)
