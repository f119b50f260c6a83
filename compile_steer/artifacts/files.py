"""Hashes, texts, and JSON records."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.writing import new_file
from compile_steer.common import distributed, reading
from compile_steer.common.errors import ArtifactError, several
from compile_steer.common.options import explain
from compile_steer.common.reading import Malformed
from compile_steer.common.yaml import parse_yaml

_Record = TypeVar("_Record")
_Artifact = TypeVar("_Artifact")

_CHECK = "record_sha256"
_SETTLED = 2.0  # seconds; clocks of file systems are coarser than a write


def save_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, value: Any) -> None:
    """Write JSON atomically; raises `ValueError` for NaN and infinity, which other readers refuse."""
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with an edit check: the SHA-256 of its content, under `record_sha256`.

    The check notices that a file was edited by hand. It is no protection against forgery: whoever computes the hash
    again can write anything.
    """
    save_json(path, {**value, _CHECK: digest(value)})


def was_edited(path: Path) -> bool:
    """True if a JSON record fails its edit check, or lost it. Raises as `edit_check` does."""
    recorded, actual = edit_check(path)
    return recorded != actual


def edit_check(path: Path) -> tuple[str, str]:
    """The SHA-256 of a JSON record's content: as recorded ('' where it has no edit check), and of the file as it is.

    Raises `ArtifactError` where the file is missing, or is no JSON object.
    """
    content = read_json(path, "Make it again.")
    return str(content.get(_CHECK, "")), digest(without_check(content))


def without_check(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON record without its edit check."""
    return {key: value for key, value in content.items() if key != _CHECK}


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; raises `ArtifactError` with the `remedy` where there is none."""
    try:
        content = reading.read_json(path)
    except Malformed as error:
        raise ArtifactError(f"{path} is damaged or cannot be read ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged (found {type(content).__name__}, needed: a JSON object). {remedy}")
    return content


def read_front_matter(path: Path) -> dict[str, Any]:
    """The fields of the YAML header of a Markdown file, a model card; none where there is no file or no valid header."""
    try:
        before, _dashes, rest = reading.read_text(path, reading.MAX_JSON).partition("---\n")
        header = parse_yaml(rest.partition("\n---\n")[0]).content if not before else None
    except Malformed:
        header = None
    return header if isinstance(header, dict) else {}


def load_json(path: Path, kind: type[_Record], name: str, remedy: str) -> _Record:
    """Read back a value of type `kind` that `save_json` or `save_record` wrote; raises `ArtifactError` for anything else.

    The message says what the file should be, its `name`, and the `remedy`.
    """
    content = without_check(read_json(path, remedy))
    return parse_record(content, kind, f"{path} is not a {name} of this version", remedy)


def load_foreign_json(path: Path, kind: type[_Record], needed: str) -> _Record:
    """Read a JSON file of another tool, whose keys that `kind` does not have mean nothing here; raises `ArtifactError`.

    Args:
        needed: what the file should be, for the error.
    """
    remedy = f"Needed: {needed}."
    return parse_record(read_json(path, remedy), kind, f"{path} is something else", remedy, unknown="ignore")


def parse_record(
    content: Any, kind: type[_Record], claim: str, remedy: str, unknown: Literal["forbid", "ignore"] = "forbid"
) -> _Record:
    """Check a JSON value against a type, strictly: no text in the place of a number; raises one `ArtifactError` with all problems.

    Args:
        kind: a dataclass, or any other type that pydantic knows.
        claim: what the error says first: "FILE is not a parity report of this version".
        unknown: 'ignore' takes keys that `kind` does not have, as other tools' files may have them.
    """
    try:
        # By way of JSON, where a tuple is a list, and the keys of a dict are text.
        return TypeAdapter(kind).validate_json(to_json(content), strict=True, extra=unknown)
    except ValidationError as error:
        raise ArtifactError(f"{claim} ({'; '.join(several(explain(error)))}). {remedy}") from error


def parse_header(metadata: Mapping[str, str], key: str, kind: type[_Record], path: Path, remedy: str) -> _Record:
    """The JSON record under `key` in the metadata of the safetensors file at `path`; raises `ArtifactError`."""
    if key not in metadata:
        raise ArtifactError(f"{path} has no '{key}' in its metadata: it is another file. {remedy}")
    claim = f"{path}: the '{key}' metadata is damaged"
    try:
        content = reading.parse_json(metadata[key])
    except Malformed as error:
        raise ArtifactError(f"{claim} ({error}). {remedy}") from error
    return parse_record(content, kind, claim, remedy, unknown="ignore")


def reuse_or_make(path: Path, load: Callable[[Path], _Artifact | None], make: Callable[[], _Artifact]) -> _Artifact:
    """Return what lies at `path` if `load` finds it usable, else what `make` makes and leaves there.

    Args:
        load: reads the artifact; None, or an `ArtifactError`, if it is damaged or was made from other inputs.
    """

    def read() -> _Artifact | None:
        try:
            return load(path) if path.exists() else None
        except ArtifactError:
            return None  # of an older version, say: made again, and replaced as a whole

    kept = distributed.first(read)  # one process decides for all
    return make() if kept is None else kept


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files in sorted order.

    A file is read once in a process while the kernel, which notes the time of every write, says that nothing changed it; see
    `forget_hashes`. A link to a folder or to nothing counts as a link: what it leads to may be the whole disk, or the folder itself.
    """
    if path.is_symlink() and not path.is_file():
        return digest(f"link to {path.readlink()}")
    if path.is_dir():
        return digest([[name, sha256(path / name)] for name in own_files(path)])
    if path.exists() and not path.is_file():  # a pipe, say, which would be waited for
        return digest("no regular file")
    state = path.stat()
    if time.time() - state.st_ctime < _SETTLED:
        return _content_sha256(path)
    return _kept_sha256(real_path(path), state.st_ino, state.st_size, state.st_ctime_ns)


def forget_hashes() -> None:
    """Have every file read again by `sha256`: what a shared or remote disk says of a file's times may be no more than a guess."""
    _kept_sha256.cache_clear()


def _content_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _kept_sha256(path: Path, _inode: int, _size: int, _changed: int) -> str:
    return _content_sha256(path)


def own_files(folder: Path) -> list[str]:
    """The relative names of the folder's files and links, sorted. Hidden ones (a hub's cache, temporaries) are left out."""
    # A linked folder is one entry here, although a library would read what is in it.
    entries = (entry for entry in sorted(folder.rglob("*")) if entry.is_symlink() or not entry.is_dir())
    files = (entry.relative_to(folder) for entry in entries)
    return [str(file) for file in files if not any(part.startswith(".") for part in file.parts)]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
