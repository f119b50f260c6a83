"""Who may write: locks that the kernel holds (flock), so that they end with their process, however it ends.

A command holds one on its output folder: a second command says who is at work there, and leaves. Every temporary folder
holds one too: whoever gets it may delete the folder. No process id is compared, because containers use the same ids.

On NFS these locks reach the other hosts too (Linux sends them to the server), unless it is mounted with `nolock` or
`local_lock`. On a disk without locks a command says so, and goes on unprotected.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from compile_steer.artifacts.paths import real_path
from compile_steer.common.errors import CHILD, ArtifactError, brief, disk_remedy, plain
from compile_steer.common.reading import Malformed, read_json

LOCK = ".compile_steer.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2), which Python does not wrap

# The lock files that this process holds, each with the thread that took it.
_held: dict[Path, int] = {}


class NoLocksError(OSError):
    """The disk has no locks."""


def try_lock(path: Path, *, wait: bool = False) -> int | None:
    """Return an open descriptor that holds the lock on the file `path`, which is made; None where somebody else holds it.

    Raises:
        NoLocksError: the disk has no locks. OSError: the file cannot be made.
    """
    while True:
        descriptor, kept = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last holder may have deleted the file meanwhile; then another one counts.
            kept = _is_at(descriptor, path)
            if kept:
                return descriptor
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise NoLocksError(*error.args) from error
            raise
        finally:
            if not kept:
                os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on an output folder, which is made if it is missing; nothing where this thread holds it already.

    Raises:
        ArtifactError: another process, or thread, writes to the folder; it cannot be written to; or it was deleted,
            or replaced, inside the block.
    """
    path = real_path(folder) / LOCK
    if _held.get(path) == threading.get_ident() or _is_parents(path):
        yield
        return
    made = [parent for parent in path.parents if not parent.exists()]
    descriptor = None
    try:
        try:
            descriptor = _take(path, folder)
            if descriptor is not None:
                _sign(descriptor, path)
                _held[path] = threading.get_ident()
        except OSError as error:
            reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error
            raise ArtifactError(
                f"{folder} cannot be written to ({reason}). {disk_remedy(error.errno)}, or choose another output folder."
            ) from error
        yield
    finally:
        deleted = descriptor is not None and not _is_at(descriptor, path)
        if descriptor is not None:
            _held.pop(path, None)
            if not deleted:
                path.unlink()
            os.close(descriptor)
        for parent in made:
            with suppress(OSError):  # it holds something now
                parent.rmdir()
        if deleted:
            raise _deleted(folder)


def _take(path: Path, folder: Path) -> int | None:
    """Lock the file `path`; None on a disk without locks. Raises `ArtifactError` where somebody else holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = try_lock(path)
        except FileNotFoundError:  # whoever held it before has removed the folder, which was empty
            continue
        except NoLocksError:
            note = f"note: {folder} is on a disk without locks: nothing keeps a second run out of it."
            print(plain(note), file=sys.stderr)
            return None
        if descriptor is None:
            raise ArtifactError(
                f"{folder} is in use by {holder(path)}. Wait until it has ended, or choose another output folder."
            )
        return descriptor


def _sign(descriptor: int, path: Path) -> None:
    """Write into a locked file who holds it."""
    with suppress(PermissionError):  # another user's file
        os.fchmod(descriptor, 0o666 & path.parent.stat().st_mode)
    about = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join(sys.argv),
        "key": uuid.uuid4().hex,
    }
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)


def holder(path: Path) -> str:
    """Describe who holds the lock on the file `path`."""
    about = _about(path)
    if not about:
        return "another process"  # which has not written its name yet
    where = "this process" if about.get("pid") == os.getpid() else f"process {brief(about.get('pid'))}"
    return f"{where} on {brief(about.get('host'))} since {brief(about.get('since'))} (command: {brief(about.get('command'))})"


def _about(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, 10_000)
    except Malformed:
        return {}
    return content if isinstance(content, dict) else {}


def require_in_place(path: Path) -> None:
    """Raise `ArtifactError` where `path` is to be written into a locked output folder that was deleted since."""
    for lock in list(_held):
        if lock.parent in real_path(path).parents and not lock.exists():
            raise _deleted(lock.parent)


def _deleted(folder: Path) -> ArtifactError:
    return ArtifactError(f"{folder} was deleted, moved or replaced while this command wrote to it. Run it again.")


def for_child() -> dict[str, str]:
    """Return the environment variables with which a child process works under this process's locks, and ends with it."""
    return {CHILD: " ".join(str(_about(path).get("key")) for path in _held)}


def _is_parents(path: Path) -> bool:
    """True where the parent process holds the lock for this one, which then ends with the parent, as the lock does."""
    about = _about(path)
    if not about or about.get("key") not in os.environ.get(CHILD, "").split():
        return False
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != about.get("pid"):
        raise ArtifactError("the command that this one belongs to has ended. Run that again.")
    return True
