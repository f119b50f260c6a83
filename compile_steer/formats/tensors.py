"""Tensors of `torch.save` and of safetensors; and pickles, which run code when they are read, and are refused.

CAA and EasyEdit2 save one vector, persona vectors a row per hidden state, hidden-directions and hotwire a row per block.
Nothing here opens a pickle but `torch.load(..., weights_only=True)`, which rebuilds tensors and runs nothing else.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import BLOCK_NUMBER, DAMAGED, ForeignVectors, ImportOptions
from compile_steer.steering.sites import POINTS, Point


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


def layer_in_name(path: Path) -> int | None:
    """The block in `vec_layer_14_MODEL.pt` (CAA) or `layer_14.pt` (EasyEdit2)."""
    match = re.search(r"(?:^|_)layer_(\d+)(?:_|$)", path.stem)
    return None if match is None else int(match[1])


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
    """Read safetensors named POINT.K, such as `resid_post.14`: what the refusals below convert pickles to.

    Raises:
        ArtifactError: the file is damaged, or has other names or vectors of several points.
    """
    tensors, _metadata = read_tensors(path)
    names = {name: re.fullmatch(rf"(\w+)\.{BLOCK_NUMBER}", name) for name in tensors}
    points: list[Point] = [point for point in get_args(Point) if any(name.startswith(f"{point}.") for name in names)]
    if len(points) != 1 or any(match is None or match[1] not in POINTS for match in names.values()):
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(names)) or 'nothing'}; needed: tensors named POINT.K, for example "
            f"resid_post.14 for the output of block 14, of one point ({', '.join(POINTS)})."
        )
    return ForeignVectors({int(match[2]): tensors[name].float() for name, match in names.items() if match}, points[0])


def read_floats(path: Path) -> Tensor:
    """Read the one dense floating-point tensor that `torch.save` wrote; raises `ArtifactError` for anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of a protocol that it did not write
            value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error}).") from error
    except DAMAGED as error:
        raise pickle_refusal(path) from error
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ArtifactError(
            f"{path} holds {kind}; needed: one tensor of floats. Save vectors by block as a safetensors file whose tensors "
            "are named resid_post.K."
        )
    return value.detach()  # it may be a parameter, which would ask for gradients


def wrong_shape(path: Path, tensor: Tensor, options: ImportOptions, needed: str) -> ArtifactError:
    """The error for a tensor of another shape, with the format that each shape would be of."""
    n_layers, d_model = options.n_layers, options.d_model
    return ArtifactError(
        f"{path} has shape {list(tensor.shape)}; this format needs {needed}. For this model of {n_layers} blocks "
        f"extract.imported.format (--format) is caa for [{d_model}], hidden_directions for [{n_layers}, {d_model}], "
        f"persona for [{n_layers + 1}, {d_model}], axbench for any other rows."
    )


def pickle_refusal(path: Path) -> ArtifactError:
    """The error for a pickle, with the lines of Python that convert it."""
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"  # torch.save writes a zip file
    load = f"torch.load({str(path)!r}, weights_only=False)" if archive else f"pickle.load(open({str(path)!r}, 'rb'))"
    return ArtifactError(
        f"{path} is damaged, or a pickle of more than plain tensors, which runs code when it is read. Nothing of it was "
        "run. If you trust it, convert it in the environment that made it, and import the result:\n"
        "    import pickle, torch\n"
        "    from safetensors.torch import save_file\n"
        f"    made = {load}\n"
        "    vectors = made.layer_activations  # of steering-vectors; of repeng it is made.directions\n"
        "    # block -> vector, for the output of the block; mlp_out or attn_out where layer_type is mlp or self_attn\n"
        "    table = {f'resid_post.{k}': torch.as_tensor(v).float().contiguous() for k, v in vectors.items()}\n"
        f"    save_file(table, {f'{path.stem}.safetensors'!r})"
    )


def hdf_refusal(path: Path) -> ArtifactError:
    """The error for pandas' HDF5, in which a column of arrays is a pickle (Stolfo et al. 2410.12877)."""
    return ArtifactError(
        f"{path} is HDF5, in which pandas keeps arrays as pickles, which run code when they are read. Nothing of it was "
        "run. If you trust it, convert one row in the environment that made it, and import the result:\n"
        "    import pandas, torch\n"
        "    from safetensors.torch import save_file\n"
        f"    row = pandas.read_hdf({str(path)!r}, 'df').iloc[0]\n"
        "    layer = row.get('selected_layer', row.get('max_diff_layer_idx'))\n"
        "    vector = torch.as_tensor(row.instr_dir).float().contiguous()\n"
        f"    save_file({{f'resid_post.{{layer}}': vector}}, {f'{path.stem}.safetensors'!r})"
    )
