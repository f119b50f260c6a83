"""safetensors files: one file read or written whole, a model folder read one tensor at a time.

Importing this module does not import torch; reading or writing tensors does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from safetensors import safe_open

from compile_steer.artifacts.files import load_foreign_json
from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.writing import new_file
from compile_steer.common.errors import ArtifactError, brief, library_errors, several
from compile_steer.common.reading import MAX_JSON, Malformed, parse_json

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 2**24  # bytes that are read at once
# Bytes of an element, by safetensors' names of types.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; raises `ArtifactError` as `new_file`."""
    with new_file(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file into a folder that is still temporary."""
    from safetensors.torch import save_file

    save_file(dict(tensors), str(path), metadata=dict(metadata))


def stream_tensors(
    path: Path,
    specs: Mapping[str, tuple[str, Sequence[int]]],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    place: Callable[[str], tuple[Path, int] | None] = lambda _name: None,
) -> int:
    """Write a safetensors file one tensor at a time (the library's own writer wants all in memory); returns the tensors' bytes.

    Args:
        specs: the type (as safetensors names it) and the shape of each tensor.
        tensor: returns it, in that type and shape.
        place: where its bytes lie already, a file and the first byte; these are copied, and `tensor` is not called.

    Raises `ArtifactError` for a packed type, and where a file ends before what it is to hold.
    """
    import torch

    packed = [
        f"{name} is stored as {kind}; needed: {', '.join(_BYTES)}."
        for name, (kind, _) in specs.items()
        if kind not in _BYTES
    ]
    if packed:
        raise ArtifactError(several(packed))
    # Wide types first, as the library orders them: every tensor then begins at a multiple of its elements' size.
    names = sorted(specs, key=lambda name: (-_BYTES[specs[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        kind, shape = specs[name]
        begin, end = end, end + _BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            begin, end = header[name]["data_offsets"]
            if (stored := place(name)) is not None:
                for piece in _pieces(*stored, end - begin):
                    file.write(piece)
                continue
            written = file.write(tensor(name).contiguous().flatten().view(torch.uint8).numpy().data)
            assert written == end - begin, f"{name} is not of the type and shape that the header says"
    return int(header[names[-1]]["data_offsets"][1]) if names else 0


def _pieces(path: Path, start: int, size: int) -> Iterator[bytes]:
    """So many bytes of a file from `start` on; raises `ArtifactError` where it ends before, since its header was read."""
    with path.open("rb") as file:
        file.seek(start)
        while size:
            if not (piece := file.read(min(_PIECE, size))):
                raise ArtifactError(
                    f"{path} was cut while it was read: {size:,} bytes from {file.tell():,} on are missing. Let nothing write "
                    "there, and get or make it again."
                )
            yield piece
            size -= len(piece)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as (tensors, metadata); raises `ArtifactError` if it cannot be one."""
    with open_tensors(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without its tensors; raises `ArtifactError` as `read_tensors` does."""
    with open_tensors(path, "np") as file:  # "np": only tensors need torch
        return dict(file.metadata() or {})


@contextmanager
def open_tensors(path: Path, framework: str) -> Iterator[Any]:
    """Yield the open safetensors file for the library's calls alone; raises `ArtifactError` where it cannot be read."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist.")
    with (
        library_errors(
            lambda reason: ArtifactError(f"{path} is damaged or not a safetensors file ({reason}). Make it again.")
        ),
        safe_open(path, framework=framework) as file,
    ):
        yield file


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The type and shape of each tensor of a safetensors file; raises `ArtifactError` where it cannot be one.

    The library, which checks places and sizes, takes one of two tensors of the same name without a word.
    """
    with open_tensors(path, "np"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > MAX_JSON:
                raise Malformed(f"its header has {length:,} bytes; at most {MAX_JSON:,} are read")
            header = parse_json(file.read(length).decode())
        except Malformed as error:
            raise ArtifactError(f"{path} is damaged: its header cannot be read ({error}). Make it again.") from error
    return {name: info for name, info in header.items() if name != "__metadata__"}


class Checkpoint:
    """The tensors of a model `folder` by name, as transformers would load them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The file of each tensor; raises as `checkpoint_files`."""
        return {name: file for file, names in checkpoint_files(self.folder).items() for name in names}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tensors in order of their names, however they are spread over files; raises as `checkpoint_files`."""
        from safetensors.torch import _TYPES

        total = hashlib.sha256()
        headers = {file: read_header(file) for file in set(self.files.values())}
        for name in sorted(self.files):
            file, place = self.places[name]
            info = headers[file][name]
            total.update(f"{name} {_TYPES[info['dtype']]} {info['shape']}\n".encode())
            # Read, not mapped: pages of a mapped file count as memory of this process.
            begin, end = info["data_offsets"]
            for piece in _pieces(file, place, end - begin):
                total.update(piece)
        return total.hexdigest()

    @cached_property
    def specs(self) -> Mapping[str, tuple[str, list[int]]]:
        """The type, such as 'F32', 'BF16' or 'F8_E4M3', and the shape in which each tensor is stored; raises as `files`."""
        files = sorted(set(self.files.values()))
        return {name: (info["dtype"], info["shape"]) for file in files for name, info in read_header(file).items()}

    @cached_property
    def places(self) -> Mapping[str, tuple[Path, int]]:
        """The file that holds each tensor, and the first of its bytes there; raises as `files`."""
        places: dict[str, tuple[Path, int]] = {}
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                data = 8 + int.from_bytes(file.read(8), "little")
            places |= {name: (path, data + info["data_offsets"][0]) for name, info in read_header(path).items()}
        return places

    def tensor(self, name: str) -> Tensor | None:
        """One tensor as it was saved, or None where the folder has none of that name."""
        if name not in self.files:  # a tied head is not saved
            return None
        with open_tensors(self.files[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Index:
    metadata: dict[str, Any]
    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def checkpoint_files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files that transformers loads for the model in `folder`, each with the names of its tensors.

    These are `model.safetensors`, or else the files that `model.safetensors.index.json` names. No other file is part of the
    model: not a shard of an earlier save, nor the same weights in another layout.

    Raises:
        ArtifactError: there are none, a file is damaged or lies outside the folder, the index names a file or a tensor that
            is not there, or two files hold the same tensor.
    """
    if others := sorted(file.name for file in folder.glob("shard-*-model-*-of-*.safetensors")):
        raise ArtifactError(
            f"{folder} holds {others[0]}, a part of a distributed checkpoint, which transformers would load in the place of "
            f"{SINGLE_FILE}. Save the model as one checkpoint: model.save_pretrained(NEW_FOLDER)."
        )
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    indexed: dict[str, str] = {}
    if not single.is_file() and index.is_file():
        if problem := misplaced(index, folder):
            raise ArtifactError(f"{problem}.")
        needed = (
            "an index of a model with 'metadata', and 'weight_map' with the file of each tensor; get or make it again"
        )
        indexed = load_foreign_json(index, _Index, needed).weight_map
    elif not single.is_file():
        raise ArtifactError(_no_weights(folder))
    files: dict[Path, list[str]] = {}
    problems: list[str] = []
    for name in sorted(set(indexed.values())) or [SINGLE_FILE]:
        file = folder / name
        if problem := misplaced(file, folder):
            problems.append(problem if not indexed else f"{problem} ({INDEX_FILE} names it).")
            continue
        files[file] = sorted(read_header(file))
    holders: dict[str, Path] = {}
    for file, names in files.items():
        problems += [f"{name} lies in both {holders[name]} and {file}." for name in names if name in holders]
        holders |= dict.fromkeys(names, file)
    problems += [
        f"{index} names {name} in {file}, which does not hold it."
        for name, file in indexed.items()
        if folder / file in files and holders.get(name) != folder / file
    ]
    if problems:
        raise ArtifactError([*several(problems), f"Get or make the model in {folder} again."])
    return files


def misplaced(file: Path, folder: Path) -> str:
    """Why `file` cannot be a part of the model in `folder`; '' where it can."""
    try:
        home, target, is_file = real_path(folder), real_path(file), file.is_file()
    except (OSError, ValueError) as error:  # too long a name, or a NUL in it
        return f"{brief(str(file))} is no name of a file ({getattr(error, 'strerror', None) or error})"
    # The hub's cache keeps a snapshot's files as links to blobs beside the snapshots.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not file.is_relative_to(folder) or ".." in file.parts[len(folder.parts) :]:
        return f"{file} lies outside of {folder}"
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        return f"{file} is a link to {target}, outside of the folder. Copy the file there instead"
    if not is_file:
        return f"{file} {'is not a file' if file.exists() else 'does not exist'}"
    return ""


def _no_weights(folder: Path) -> str:
    needed = f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}"
    others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if others:
        return (
            f"{needed}, only {others[0]}: a pickle, which can run code when it is read. Get the model's safetensors files, or "
            "where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    return f"{needed}; {f'{others[0]} is not what transformers loads' if others else 'only safetensors are read'}."
