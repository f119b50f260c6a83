"""Writing artifacts so that a run killed at any moment leaves the old one or the new one, never half.

Everything is written to a temporary name in the same folder, flushed to the disk, then renamed. A
folder that replaces another is exchanged with it in one system call where the kernel can. What is read back is
whole, or is refused.
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

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TEMPORARY = ".writing-"
_SEAL = "record_sha256"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
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
    """Yield a temporary folder beside `path`; on success it takes the place of `path` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
            _flush(file)
        _take_place(temporary, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prefix() -> str:
    return f"{_TEMPORARY}{os.getpid()}-"


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`: temporaries whose process is gone."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        process = left.name.removeprefix(_TEMPORARY).split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists, and is somebody else's
    return True


def _take_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was at `path` is left at `new` for the caller to delete."""
    if not path.exists():
        new.replace(path)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    exchange = getattr(libc, "renameat2", None)
    both = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path))
    if exchange is not None and exchange(*both, _RENAME_EXCHANGE) == 0:
        return
    # No atomic exchange on this system: two renames, the old one kept until the new one is in place.
    aside = Path(tempfile.mkdtemp(prefix=_prefix(), dir=path.parent))
    path.replace(aside / "old")
    new.replace(path)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
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
    """Write JSON atomically; refuses NaN and infinity, which no other reader would take."""
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of all its other keys, so that a later edit shows."""
    save_json(path, {**value, _SEAL: digest(value)})


def broken_seal(path: Path) -> bool:
    """True if a sealed JSON file was edited since; raises `ArtifactError` where it is no JSON object."""
    recorded, found = seal(path)
    return recorded not in ("", found)


def seal(path: Path) -> tuple[str, str]:
    """SHA-256 of what a sealed JSON file says: as recorded ('' where it was not sealed), and as found.

    Raises:
        ArtifactError: the file is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = content.pop(_SEAL, "")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Make it again.") from error
    return str(recorded), digest(content)


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """A sealed JSON object without its seal."""
    return {key: one for key, one in value.items() if key != _SEAL}


def load_json(path: Path, kind: type[_Report], name: str, command: str) -> _Report:
    """Read back a dataclass that was written as JSON.

    Args:
        name: what the file must be, in words.
        command: the one of the command line that makes it.

    Raises:
        ArtifactError: the file is missing, damaged, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        lacking = [".".join(map(str, one["loc"])) for one in problems if one["type"] == "missing"]
        if lacking and len(lacking) == len(problems):
            raise ArtifactError(
                f"{path} is not a {name} of this version: it lacks {', '.join(lacking)}. Make it anew with "
                f"'compile-steer {command}'."
            ) from error
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{path} is not a {name} ({reason}). Make it with 'compile-steer {command}'.") from error


def sha256(path: Path, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files in sorted order.

    What begins with a dot is no part of a folder: a hub's bookkeeping, a writer's temporary.

    Args:
        without: names of files in a folder that do not count (reports about the folder itself).
    """
    if path.is_dir():
        return digest([[name, sha256(path / name)] for name in own_files(path) if Path(name).name not in without])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(folder: Path) -> list[str]:
    """The folder's files by their relative names in sorted order, hidden ones left out."""
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    return [str(file) for file in files if not any(part.startswith(".") for part in file.parts)]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
