"""Which format a file is of, and what of the recipe each format reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compile_steer.common.errors import ArtifactError
from compile_steer.formats import control_vector, features, repsteer, svec, table, tensors
from compile_steer.formats.foreign import Foreign, Given, require_fit
from compile_steer.formats.pickles import OBJECTS, TABLES, TENSORS, refusal, table_refusal

Format = Literal[
    "gguf",
    "svec",
    "safetensors",
    "caa",
    "persona",
    "hidden_directions",
    "axbench",
    "saelens",
    "neuronpedia",
    "repsteer",
]


@dataclass(frozen=True)
class _Reader:
    """A format's function, and the keys of `extract.imported` that it reads."""

    read: Callable[[Path, Given], Foreign]
    keys: tuple[str, ...] = ()


_READERS: dict[Format, _Reader] = {
    "gguf": _Reader(control_vector.read, ("layer_convention",)),
    "svec": _Reader(svec.read, ("layer_convention",)),
    "safetensors": _Reader(table.read),
    "caa": _Reader(tensors.read_one, ("layer",)),
    "persona": _Reader(tensors.read_states),
    "hidden_directions": _Reader(tensors.read_blocks),
    "axbench": _Reader(tensors.read_concept, ("layer", "index")),
    "saelens": _Reader(features.read_saelens, ("index",)),
    "neuronpedia": _Reader(features.read_neuronpedia),
    "repsteer": _Reader(repsteer.read),
}
_BY_NAME: dict[str, Format] = {
    ".gguf": "gguf",
    ".svec": "svec",
    ".safetensors": "safetensors",
    ".json": "neuronpedia",
}
_BY_CONTENT: dict[str, Format] = {features.CONFIG: "saelens", repsteer.MANIFEST: "repsteer"}


def read(path: Path, named: Format | None, given: Given) -> Foreign:
    """The vectors of a file or folder, checked against the model's size.

    Args:
        named: the format, where the recipe says it; otherwise it is told by the file's name or the folder's content.

    Raises:
        ArtifactError: the file is missing, damaged, a pickle of code, of another width or depth, or holds NaN; its
            format or its blocks cannot be told; or something was said that its format does not read.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; extract.imported.file (--from) names a vector's file or folder.")
    suffix = path.suffix.lower()
    if path.is_file() and suffix in OBJECTS:
        raise refusal(path)
    if path.is_file() and suffix in TABLES:
        raise table_refusal(path)
    kind = named or _guess(path, given)
    said = {"layer_convention": given.layer_convention, "layer": given.layer, "index": given.index}
    unread = [key for key, value in said.items() if value is not None and key not in _READERS[kind].keys]
    if unread:
        raise ArtifactError(f"{path} is read as {kind}, which does not take extract.imported.{' and '.join(unread)}.")
    if path.is_dir() != (kind in _BY_CONTENT.values()):
        needed = "a file" if path.is_dir() else "a folder"
        raise ArtifactError(
            f"{path} is {'a folder' if path.is_dir() else 'a file'}; a vector of format {kind} is {needed}."
        )
    found = _READERS[kind].read(path, given)
    require_fit(path, found, given.n_layers, given.d_model)
    return found


def _guess(path: Path, given: Given) -> Format:
    if path.is_dir():
        kinds = [kind for name, kind in _BY_CONTENT.items() if (path / name).is_file()]
        if len(kinds) == 1:
            return kinds[0]
        raise ArtifactError(f"{path} holds none of {', '.join(_BY_CONTENT)}; needed: a SAELens or a repsteer folder.")
    suffix = path.suffix.lower()
    if suffix in _BY_NAME:
        return _BY_NAME[suffix]
    if suffix in TENSORS:
        if given.index is not None:
            return "axbench"
        if given.layer is not None or tensors.named_layer(path) is not None:
            return "caa"
        if path.stem.endswith("_diff"):  # TRAIT_response_avg_diff.pt and the like
            return "persona"
    raise ArtifactError(
        f"{path}: its name does not tell the format. Set extract.imported.format (--format) to one of "
        f"{', '.join(_READERS)}."
    )
