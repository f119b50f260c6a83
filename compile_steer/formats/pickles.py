"""Pickles, which run code when they are read: refused, with the lines that convert them where they are trusted.

Nothing here opens one but `torch.load(..., weights_only=True)`, which rebuilds tensors and runs nothing else.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from compile_steer.common.errors import ArtifactError

TENSORS = (".pt", ".pth", ".bin", ".ckpt")
OBJECTS = (".pkl", ".pickle")
TABLES = (".h5", ".hdf5", ".hdf")


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors, containers and numbers alone; raises `ArtifactError` otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of a protocol that it did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # bytes that are no tensors end in nearly any error, of the archive's or the unpickler's
        raise refusal(path) from error


def refusal(path: Path) -> ArtifactError:
    """Why a file is not read, and how its owner converts it."""
    into = f"{path.stem}.safetensors"
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"  # a zip file, what torch.save writes
    load = f"torch.load({str(path)!r}, weights_only=False)" if archive else f"pickle.load(open({str(path)!r}, 'rb'))"
    return ArtifactError(
        f"{path} is damaged, or a pickle of more than plain tensors, which runs code when it is read. Nothing of it was "
        "run. If you trust it, convert it in the environment that made it, and import what comes out:\n"
        "    import pickle, torch\n"
        "    from safetensors.torch import save_file\n"
        f"    made = {load}\n"
        "    vectors = made.layer_activations  # of steering-vectors; of repeng it is made.directions\n"
        "    # block -> vector, for the output of the block; mlp_out or attn_out where layer_type is mlp or self_attn\n"
        "    table = {f'resid_post.{k}': torch.as_tensor(v).float().contiguous() for k, v in vectors.items()}\n"
        f"    save_file(table, {into!r})"
    )


def table_refusal(path: Path) -> ArtifactError:
    """The same for pandas' HDF5, in which a column of arrays is a pickle (Stolfo et al. 2410.12877)."""
    return ArtifactError(
        f"{path} is HDF5, in which pandas keeps arrays as pickles, which run code when they are read. Nothing of it was "
        "run. If you trust it, convert one row in the environment that made it, and import what comes out:\n"
        "    import pandas, torch\n"
        "    from safetensors.torch import save_file\n"
        f"    row = pandas.read_hdf({str(path)!r}, 'df').iloc[0]\n"
        "    layer = row.get('selected_layer', row.get('max_diff_layer_idx'))\n"
        "    vector = torch.as_tensor(row.instr_dir).float().contiguous()\n"
        f"    save_file({{f'resid_post.{{layer}}': vector}}, {f'{path.stem}.safetensors'!r})"
    )
