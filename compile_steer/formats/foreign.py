"""Steering vectors in other tools' files: which format a file has, and checks that every format shares.

Importing this module does not import torch; reading a file does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.sites import Point

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FileFormat = Literal["gguf", "svec", "safetensors", "caa", "persona", "hidden_directions", "axbench", "neuronpedia"]
FolderFormat = Literal["saelens", "repsteer"]
Format = Literal[FileFormat, FolderFormat]
# What a number k in a file means. block: the output of block k. hidden_state: transformers' hidden_states[k], which
# is the input of block k, so the output of block k - 1; 0 is the embeddings.
LayerConvention = Literal["block", "hidden_state"]

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
PICKLE_SUFFIXES = (".pkl", ".pickle")
HDF_SUFFIXES = (".h5", ".hdf5", ".hdf")
SAELENS_CONFIG, REPSTEER_MANIFEST = "cfg.json", "manifest.json"
BLOCK_NUMBER = r"(0|[1-9]\d{0,4})"  # as file formats write it: no sign, no leading zero

_BY_SUFFIX: dict[str, Format] = {f".{kind}": kind for kind in ("gguf", "svec", "safetensors")} | {
    ".json": "neuronpedia"
}
_BY_CONTENT: dict[str, Format] = {SAELENS_CONFIG: "saelens", REPSTEER_MANIFEST: "repsteer"}


@dataclass(frozen=True)
class ImportOptions:
    """The size of the model that vectors are for, and what `extract.imported` says about their file."""

    n_layers: int
    d_model: int
    controls: int  # how many other vectors to take as controls, if the file has any
    generator: torch.Generator  # chooses these
    layer_convention: LayerConvention | None = None
    layer: int | None = None
    index: int | None = None


@dataclass(frozen=True)
class ForeignVectors:
    """Vectors of a file, to be added as they are with coefficient 1."""

    vectors: Mapping[int, Tensor]  # block -> [d_model] fp32 at `point`, in the activations' units; zeros are no vector
    point: Point = "resid_post"
    others: Tensor | None = None  # [n, d_model] of the same kind, in files of one block
    embeddings: bool = False  # whether the file also has a vector for the embeddings, which are the output of no block
    made_for: str = ""  # the model or its type, if the file says


def read_vectors(path: Path, format: Format | None, options: ImportOptions) -> ForeignVectors:
    """Read the vectors of a file or folder, and check them against the model's size.

    Args:
        format: if None, it is inferred from the file's name or the folder's content.

    Raises:
        ArtifactError: the file is missing, damaged, a pickle of code, of another width or depth, or holds NaN; its
            format or its blocks are ambiguous; or an option was given that its format does not use.
    """
    from compile_steer.formats import tensors, vectors

    # For each format its reader, and the keys of `extract.imported` that it uses.
    readers: dict[Format, tuple[Callable[[Path, ImportOptions], ForeignVectors], tuple[str, ...]]] = {
        "gguf": (vectors.read_gguf, ("layer_convention",)),
        "svec": (vectors.read_svec, ("layer_convention",)),
        "safetensors": (tensors.read_table, ()),
        "caa": (tensors.read_single, ("layer",)),
        "persona": (tensors.read_hidden_states, ()),
        "hidden_directions": (tensors.read_blocks, ()),
        "axbench": (tensors.read_axbench, ("layer", "index")),
        "saelens": (tensors.read_saelens, ("index",)),
        "neuronpedia": (tensors.read_neuronpedia, ()),
        "repsteer": (vectors.read_repsteer, ()),
    }
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; extract.imported.file (--from) names a vector's file or folder.")
    if path.is_file() and path.suffix.lower() in (*PICKLE_SUFFIXES, *HDF_SUFFIXES):
        raise tensors.pickle_refusal(path)
    kind = format or _infer_format(path, options)
    read, keys = readers[kind]
    settings = ("layer_convention", "layer", "index")
    unused = [key for key in settings if key not in keys and getattr(options, key) is not None]
    if unused:
        raise ArtifactError(f"{path} is read as {kind}, which does not take extract.imported.{' and '.join(unused)}.")
    if path.is_dir() != (kind in get_args(FolderFormat)):
        actual, needed = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise ArtifactError(f"{path} is a {actual}; a vector of format {kind} is a {needed}.")
    result = read(path, options)
    _require_fit(path, result, options)
    return result


def _infer_format(path: Path, options: ImportOptions) -> Format:
    if path.is_dir():
        kinds = [kind for name, kind in _BY_CONTENT.items() if (path / name).is_file()]
        if len(kinds) == 1:
            return kinds[0]
        raise ArtifactError(f"{path} holds none of {', '.join(_BY_CONTENT)}; needed: a SAELens or a repsteer folder.")
    suffix = path.suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix in TORCH_SUFFIXES:
        if options.index is not None:
            return "axbench"
        if options.layer is not None or layer_in_name(path) is not None:
            return "caa"
        if path.stem.endswith("_diff"):  # persona vectors are saved as TRAIT_response_avg_diff.pt and the like
            return "persona"
    raise ArtifactError(
        f"{path}: its name does not tell the format. Set extract.imported.format (--format) to one of "
        f"{', '.join(get_args(Format))}."
    )


def layer_in_name(path: Path) -> int | None:
    """The block in `vec_layer_14_MODEL.pt` (CAA) or `layer_14.pt` (EasyEdit2)."""
    match = re.search(r"(?:^|_)layer_(\d+)(?:_|$)", path.stem)
    return None if match is None else int(match[1])


def _require_fit(path: Path, foreign: ForeignVectors, options: ImportOptions) -> None:
    """Raise `ArtifactError` with every reason why these vectors do not fit the model."""
    problems = []
    vectors = foreign.vectors.values()
    shapes = {tuple(vector.shape) for vector in vectors} - {(options.d_model,)}
    if shapes:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes))
        hint = f" (it was made for '{foreign.made_for}')" if foreign.made_for else ""
        problems.append(f"{path}: vectors of shape {listed}; the model is {options.d_model} wide{hint}.")
    outside = sorted(layer for layer in foreign.vectors if not 0 <= layer < options.n_layers)
    if outside:
        blocks = ", ".join(map(str, outside))
        problems.append(f"{path} is of blocks {blocks} too; the model has {options.n_layers}, counted from 0.")
    if not all(bool(vector.isfinite().all()) for vector in vectors):
        problems.append(f"{path} holds NaN or infinity.")
    elif not any(bool(vector.any()) for vector in vectors):
        problems.append(f"{path}: every vector is 0; it steers nothing.")
    if problems:
        raise ArtifactError([*problems, "Use a vector of this very model."])


def place_at_blocks(
    path: Path,
    by_number: Mapping[int, Tensor],
    convention: LayerConvention | None,
    label: str,
    conventions: str,
    made_for: str,
) -> ForeignVectors:
    """Assign numbered vectors to blocks; raises `ArtifactError` without a convention.

    `label` is how the file writes number k, with {} for k; `conventions` says which tools use which, for the error.
    """
    if convention is None:
        first, last = label.format(min(by_number)), label.format(max(by_number))
        raise ArtifactError(
            f"{path} has {first}{f' to {last}' if first != last else ''}{f' for {made_for!r}' if made_for else ''}, and "
            "does not say which blocks these are. Set extract.imported.layer_convention (--layer-convention) to block, "
            f"where {label.format('k')} is of the output of block k, or to hidden_state, where it is of "
            f"hidden_states[k], the output of block k-1. {conventions}"
        )
    if convention == "block":
        return ForeignVectors(by_number, made_for=made_for)
    vectors = {k - 1: vector for k, vector in by_number.items() if k > 0}
    return ForeignVectors(vectors, embeddings=0 in by_number and bool(by_number[0].any()), made_for=made_for)
