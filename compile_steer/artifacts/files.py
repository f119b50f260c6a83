"""Atomic writes, hashes, and JSON records.

A run that is killed at any moment leaves the old file or folder, or the new one, never half of one. Everything is written
under a temporary name in the same folder, flushed to the disk, then renamed. A folder that replaces another is
exchanged with it in one system call where the kernel can.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from compile_steer.common.errors import ArtifactError

_Report = TypeVar("_Report")

# Values of Linux's renameat2(2), which Python does not wrap.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TEMPORARY = ".writing-"
_CHECK = "record_sha256"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed."""
    _prepare(path.parent)
    handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; an artifact is as readable as the folder's other files.
        temporary.chmod(0o666 & ~_umask())
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path` as a whole, on any error it is removed."""
    _prepare(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
            _flush(file)
        _replace_folder(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix() -> str:
    return f"{_TEMPORARY}{os.getpid()}-"


def _prepare(folder: Path) -> None:
    """Make `folder`, and remove the temporaries in it whose process was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        process = leftover.name.removeprefix(_TEMPORARY).split("-")[0]
        if process.isdigit() and not _is_running(int(process)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and belongs to somebody else
    return True


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was at `path` is left at `new` for the caller to delete."""
    if not path.exists():
        new.replace(path)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    both = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path))
    if exchange is not None and exchange(*both, _RENAME_EXCHANGE) == 0:
        return
    # No atomic exchange on this system: two renames, the old folder kept until the new one is in place.
    aside = Path(tempfile.mkdtemp(prefix=_prefix(), dir=path.parent))
    path.replace(aside / "old")
    new.replace(path)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """True if a JSON record fails its edit check; False if it passes or has none. Raises as `edit_check` does."""
    recorded, actual = edit_check(path)
    return recorded not in ("", actual)


def edit_check(path: Path) -> tuple[str, str]:
    """The SHA-256 of a JSON record's content: as recorded ('' where it has no edit check), and of the file as it is.

    Raises:
        ArtifactError: the file is missing, or is no JSON object.
    """
    content = read_json(path, "Make it again.")
    return str(content.get(_CHECK, "")), digest(without_check(content))


def without_check(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON record without its edit check."""
    return {key: value for key, value in content.items() if key != _CHECK}


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; raises `ArtifactError` with the `remedy` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets in brackets
        raise ArtifactError(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} is damaged (found {type(content).__name__}, needed: a JSON object). {remedy}")
    return content


def load_json(path: Path, kind: type[_Report], name: str, command: str) -> _Report:
    """Read back a dataclass of type `kind` that was written as JSON.

    Args:
        name: what the file should be, for the message.
        command: the command of `compile-steer` that makes it.

    Raises:
        ArtifactError: the file is missing, damaged, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        missing = [".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"]
        if missing and len(missing) == len(problems):
            raise ArtifactError(
                f"{path} is not a {name} of this version: it lacks {', '.join(missing)}. Make it again with "
                f"'compile-steer {command}'."
            ) from error
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a {name} ({reason}). Make it with 'compile-steer {command}'.") from error


def sha256(path: Path, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files in sorted order.

    Args:
        without: names of files in a folder that do not count (reports about the folder itself).
    """
    if path.is_dir():
        return digest([[name, sha256(path / name)] for name in own_files(path) if Path(name).name not in without])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(folder: Path) -> list[str]:
    """The relative names of the folder's files, sorted. Hidden files (a hub's cache, temporaries) are left out."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [str(file) for file in files if not any(part.startswith(".") for part in file.parts)]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
