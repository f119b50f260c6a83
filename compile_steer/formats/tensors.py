"""Tensors of `torch.save` and of safetensors, and features of dictionaries; pickles that run code are refused.

CAA and EasyEdit2 save one vector, persona vectors a row per hidden state, hidden-directions and hotwire a row per block,
AxBench a row per concept. A SAELens folder holds `cfg.json` and `sae_weights.safetensors` with `W_dec` [d_sae, d_model].
A feature of Neuronpedia's API is one JSON object with `vector` and `hookName`. Nothing here opens a pickle but
`torch.load(..., weights_only=True)`, which rebuilds tensors and runs nothing else.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compile_steer.artifacts.files import load_foreign_json
from compile_steer.artifacts.tensors import open_tensors, read_tensors
from compile_steer.common.errors import ArtifactError, library_errors
from compile_steer.formats.foreign import (
    BLOCK_NUMBER,
    HDF_SUFFIXES,
    PICKLE_SUFFIXES,
    SAELENS_CONFIG,
    TORCH_SUFFIXES,
    ForeignVectors,
    ImportOptions,
    layer_in_name,
)
from compile_steer.steering.sites import POINTS, Site

_SAELENS_WEIGHTS = "sae_weights.safetensors"


def read_single(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read [d_model], for the output of the block in the file's name or the recipe; raises `ArtifactError`."""
    vector = read_floats(path)
    named = layer_in_name(path)
    if options.layer is not None and named not in (None, options.layer):
        raise ArtifactError(
            f"{path} is named for block {named}, but extract.imported.layer (--layer) is {options.layer}."
        )
    layer = named if options.layer is None else options.layer
    if layer is None:
        raise ArtifactError(
            f"{path} does not say its block. Set extract.imported.layer (--layer), or name the file layer_K.pt."
        )
    if vector.ndim != 1:
        raise wrong_shape(path, vector, options, "[d_model]")
    return ForeignVectors({layer: vector.float()})


def read_hidden_states(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read persona vectors [n_layers + 1, d_model]; row r is of hidden_states[r]. Raises `ArtifactError`.

    Row 0 is of the embeddings. The last row was read after the model's final norm, as transformers returns it.
    """
    rows = _read_rows(path, options, options.n_layers + 1)
    return ForeignVectors({row - 1: rows[row].float() for row in range(1, len(rows))}, embeddings=bool(rows[0].any()))


def read_blocks(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read [n_layers, d_model]; row k is of the output of block k. Raises `ArtifactError`."""
    rows = _read_rows(path, options, options.n_layers)
    return ForeignVectors({layer: rows[layer].float() for layer in range(len(rows))})


def _read_rows(path: Path, options: ImportOptions, n_rows: int) -> Tensor:
    rows = read_floats(path)
    if rows.ndim != 2 or len(rows) != n_rows:
        raise wrong_shape(path, rows, options, f"[{n_rows}, d_model]")
    return rows


def read_table(path: Path, _options: ImportOptions) -> ForeignVectors:
    """Read safetensors named POINT.K, such as `resid_post.14`, of one point; raises `ArtifactError`."""
    tensors = read_tensors(path)[0]
    names = {name: re.fullmatch(rf"({'|'.join(POINTS)})\.{BLOCK_NUMBER}", name) for name in tensors}
    points: set[Any] = {match and match[1] for match in names.values()}
    if len(points) != 1 or None in points:
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}; needed: tensors named POINT.K, for example "
            f"resid_post.14 for the output of block 14, of one point ({', '.join(POINTS)})."
        )
    return ForeignVectors({int(match[2]): tensors[name].float() for name, match in names.items() if match}, *points)


@dataclass(frozen=True)
class _SaelensHook:
    hook_name: str | None = None


@dataclass(frozen=True)
class _SaelensConfig(_SaelensHook):
    metadata: _SaelensHook | None = None  # from SAELens 6 on, the hook is here


@dataclass(frozen=True)
class _Feature:
    """What is read of a feature; the names are Neuronpedia's."""

    vector: list[float] | None = None
    hookName: str | None = None  # noqa: N815
    modelId: str | None = None  # noqa: N815


def read_saelens(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read row `options.index` of the decoder, and other rows as controls; raises `ArtifactError`."""
    config = load_foreign_json(path / SAELENS_CONFIG, _SaelensConfig, "a SAELens configuration")
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
    site = _site_of_hook(path / SAELENS_CONFIG, (config.metadata or config).hook_name)
    with open_tensors(weights, "pt") as file:
        if "W_dec" not in file.keys():  # noqa: SIM118  (not a dictionary)
            raise ArtifactError(f"{weights} has no 'W_dec'; needed: the decoder of an autoencoder.")
        decoder = file.get_slice("W_dec")  # a row at a time: a decoder can have gigabytes
        controls = choose_other_rows(path, decoder.get_shape()[0], options)
        others = torch.stack([decoder[row].float() for row in controls])
        return ForeignVectors({site.layer: decoder[options.index].float()}, site.point, others)


def read_neuronpedia(path: Path, _options: ImportOptions) -> ForeignVectors:
    """Read the feature's vector; raises `ArtifactError` if the file has none."""
    content = load_foreign_json(path, _Feature, "a feature's JSON as Neuronpedia gives it")
    if not content.vector:
        raise ArtifactError(
            f"{path} holds no vector (Neuronpedia leaves it out of many features); save the feature's row from its "
            "autoencoder: a SAELens folder and extract.imported.index."
        )
    site = _site_of_hook(path, content.hookName)
    vector = torch.tensor(content.vector, dtype=torch.float64).float()  # 1e300 becomes infinity, which is refused later
    return ForeignVectors({site.layer: vector}, site.point, made_for=content.modelId or "")


def read_axbench(path: Path, options: ImportOptions) -> ForeignVectors:
    """Read row `options.index`, for the output of block `options.layer`, and other rows as controls.

    Raises `ArtifactError` if the block or the row is not specified, or the tensor is something else.
    """
    rows = read_floats(path)
    if rows.ndim != 2:
        raise wrong_shape(path, rows, options, "[n_concepts, d_model]")
    others = rows[choose_other_rows(path, len(rows), options)].float()
    if options.layer is None:
        raise ArtifactError(f"{path} does not say its block. Set extract.imported.layer (--layer).")
    return ForeignVectors({options.layer: rows[options.index].float()}, others=others)


def choose_other_rows(path: Path, n_rows: int, options: ImportOptions) -> list[int]:
    """Draw `options.controls` row numbers below `n_rows`, other than `options.index`; raises `ArtifactError`."""
    if options.index is None or options.index >= n_rows or options.controls >= n_rows:
        raise ArtifactError(
            f"{path} has {n_rows} rows, counted from 0; needed are extract.imported.index (--index; found {options.index}) "
            f"and {options.controls} others as controls (extract.shuffled)."
        )
    drawn = torch.randperm(n_rows - 1, generator=options.generator)[: options.controls].tolist()
    return [row + (row >= options.index) for row in drawn]  # leaves out `index` itself


def _site_of_hook(path: Path, hook: str | None) -> Site:
    """The site of a TransformerLens hook point."""
    match = re.fullmatch(rf"blocks\.{BLOCK_NUMBER}\.hook_({'|'.join(POINTS)})", hook or "")
    if match is None:
        raise ArtifactError(
            f"{path}: the feature is of '{hook}'; needed: blocks.K.hook_NAME, where NAME is one of {', '.join(POINTS)}."
        )
    point: Any = match[2]
    return as_output(Site(int(match[1]), point))


def as_output(site: Site) -> Site:
    """The same site, as the output of a block where it is the input of the block above."""
    return Site(site.layer - 1) if site.point == "resid_pre" and site.layer > 0 else site


def read_floats(path: Path) -> Tensor:
    """Read the one dense floating-point tensor that `torch.save` wrote; raises `ArtifactError` for anything else."""
    with library_errors(lambda reason: ArtifactError(f"{path} cannot be read ({reason}).")), path.open("rb") as file:
        size, unpacked = path.stat().st_size, 0
        if zipfile.is_zipfile(file):
            unpacked = sum(record.file_size for record in zipfile.ZipFile(file).infolist())
    # torch.save does not compress: an archive of more than the file's size is made to fill the memory.
    with library_errors(lambda _reason: pickle_refusal(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about pickles of a protocol that it did not write
        value = torch.load(path, map_location="cpu", weights_only=True) if unpacked <= size else None
    # Of a tensor: one number with a stride of 0, say.
    if value is None or (isinstance(value, Tensor) and value.numel() * value.element_size() > size):
        raise ArtifactError(f"{path} claims more numbers than its {size:,} bytes can hold. Save the vector again.")
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta  # meta: no numbers
    if isinstance(value, Tensor) and dense and value.is_floating_point():
        return value.detach()  # it may be a parameter, which would ask for gradients
    kind = f"{value.layout} {value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
    raise ArtifactError(
        f"{path} holds: {kind}; needed: one tensor of floats. Save vectors by block as a safetensors file whose tensors "
        "are named resid_post.K."
    )


def wrong_shape(path: Path, tensor: Tensor, options: ImportOptions, needed: str) -> ArtifactError:
    """The error for a tensor of another shape, with the format that each shape would be of."""
    n_layers, d_model = options.n_layers, options.d_model
    return ArtifactError(
        f"{path} has shape {list(tensor.shape)}; this format needs {needed}. For this model of {n_layers} blocks "
        f"extract.imported.format (--format) is caa for [{d_model}], hidden_directions for [{n_layers}, {d_model}], "
        f"persona for [{n_layers + 1}, {d_model}], axbench for any other rows."
    )


def pickle_refusal(path: Path) -> ArtifactError:
    """The error for a pickle, or for pandas' HDF5 (Stolfo et al. 2410.12877), with the lines of Python that convert it."""
    if path.suffix.lower() in HDF_SUFFIXES:
        problem, part = "is HDF5, in which pandas keeps arrays as pickles, which run code when they are read", "one row"
        modules = "pandas, torch"
        lines = [
            f"row = pandas.read_hdf({str(path)!r}, 'df').iloc[0]",
            "layer = row.get('selected_layer', row.get('max_diff_layer_idx'))",
            "table = {f'resid_post.{layer}': torch.as_tensor(row.instr_dir).float().contiguous()}",
        ]
    else:
        problem, part = "is damaged, or a pickle of more than plain tensors, which runs code when it is read", "it"
        modules = "pickle, torch"
        with path.open("rb") as file:
            archive = file.read(2) == b"PK"  # torch.save writes a zip file
        load = "torch.load({!r}, weights_only=False)" if archive else "pickle.load(open({!r}, 'rb'))"
        lines = [
            f"made = {load.format(str(path))}",
            "vectors = made.layer_activations  # of steering-vectors; of repeng it is made.directions",
            "# block -> vector, for the output of the block; mlp_out or attn_out where layer_type is mlp or self_attn",
            "table = {f'resid_post.{k}': torch.as_tensor(v).float().contiguous() for k, v in vectors.items()}",
        ]
    steps = [f"import {modules}", "from safetensors.torch import save_file", *lines]
    text = f"{path} {problem}. Nothing of it was run. If you trust it, convert {part} in the environment that made it"
    saved = f"save_file(table, {f'{path.stem}.safetensors'!r})"
    return ArtifactError("\n    ".join([f"{text}, and import the result:", *steps, saved]))
