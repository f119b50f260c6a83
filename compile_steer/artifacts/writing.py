"""Atomic writes: a run that is killed at any moment leaves the old file or folder, or the new one, never half of one.

Everything is written under a temporary name beside its place, flushed to the disk, then renamed. A folder that replaces
another is exchanged with it in one system call where the kernel can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compile_steer.artifacts.locks import LOCK, NoLocksError, require_in_place, try_lock
from compile_steer.common.errors import ArtifactError, CompileSteerError, disk_remedy

# Values of Linux's renameat2(2), which Python does not wrap.
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TEMPORARY = ".writing-"  # before the name of what is written
_REPLACED = ".old"
_PATIENCE = 2.0  # seconds that somebody who only clears a leftover away may take
# Errors of the disk or the system that a writer of any kind may meet.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_PROBLEMS = (
    *_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EISDIR, errno.ENOTDIR,
)  # fmt: skip


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; on success it replaces `path`, on any error it is removed.

    Raises:
        ArtifactError: the disk is full, or refuses the file.
    """
    with _TemporaryPlace(path, wait=True) as temporary:
        yield temporary
        _publish(temporary)
        temporary.replace(path)
        _flush(path.parent)


@contextmanager
def new_folder(path: Path, *, wait: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; on success it replaces `path` as a whole, on any error it is removed.

    Args:
        wait: until another process that is making the same folder has ended, instead of refusing.

    Raises:
        ArtifactError: the disk is full, or refuses a file; or another process makes the same folder at this moment.
    """
    with _TemporaryPlace(path, wait) as temporary:
        temporary.mkdir()
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _publish(file)
        if not path.exists():
            temporary.replace(path)
        elif not _exchange(temporary, path):
            # Two renames; `_clear` finishes them where a kill comes in between.
            path.replace(temporary.with_name(_REPLACED))
            temporary.replace(path)
        _flush(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one system call; False where the system or the disk has none."""
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b))
    return exchange is not None and exchange(*names, _RENAME_EXCHANGE) == 0


class _TemporaryPlace:
    """A path of the same name in a hidden folder beside `path` (a rename needs the same disk), which is removed at the end.

    The folder belongs to whoever holds the lock in it: what a writer left behind that was killed is removed by the next
    one. What is in the way of writing (a full disk, say) becomes an `ArtifactError`, whichever library met it.
    """

    def __init__(self, path: Path, wait: bool) -> None:
        self.path, self.wait = path, wait
        self.folder = path.with_name(f"{_TEMPORARY}{path.name}")
        self.lock: int | None = None

    def __enter__(self) -> Path:
        require_in_place(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)
            self._take()
        except OSError as error:
            raise self._refused(error.errno) from error
        return self.folder / self.path.name

    def _take(self) -> None:
        limit = time.monotonic() + _PATIENCE
        while self.lock is None:
            self.folder.mkdir(exist_ok=True)
            try:
                self.lock = try_lock(self.folder / LOCK, wait=self.wait)
            except FileNotFoundError:
                continue  # its last holder has just removed the folder
            except NoLocksError:
                # A folder of this writer's own, which nobody else will take for a leftover.
                self.folder = self.path.with_name(f"{_TEMPORARY}{self.path.name}-{uuid.uuid4().hex}")
                self.folder.mkdir()
                return
            if self.lock is None:
                if time.monotonic() > limit:
                    raise ArtifactError(f"{self.path} is being written by another process. Wait until it has ended.")
                time.sleep(0.02)
        _clear(self.folder)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        number = None if error is None else self._disk_problem(error)
        refused = self._refused(number) if number is not None else None
        with suppress(OSError):  # no file can be opened any more, say: the next writer removes it
            _clear(self.folder)
        _remove(self.folder, self.lock)
        if refused is not None:
            raise refused from error
        inner, real = str(self.folder / self.path.name), str(self.path)
        if isinstance(error, CompileSteerError) and inner in str(error):  # a reader of it will find nothing there
            raise type(error)([problem.replace(inner, real) for problem in error.problems]) from error

    def _disk_problem(self, error: BaseException) -> int | None:
        """The system's number of what keeps a library from writing here; None where its error is about something else."""
        if not self.folder.is_dir():
            return errno.ESTALE
        if isinstance(error, CompileSteerError):
            return None  # it says already what is wrong
        # safetensors and tokenizers quote the system's error number; torch names its own source file alone.
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        number = int(quoted[1]) if quoted else errno.ENOSPC if "inline_container.cc" in str(error) else None
        if isinstance(error, OSError):
            # Of a copy the second name is what was written. numpy counts what it wrote, and gives no number.
            names = [str(name) for name in (error.filename, error.filename2) if name is not None] or [str(self.folder)]
            if any(name.startswith(str(self.path.parent)) for name in names):
                number = errno.ENOSPC if error.errno is None and "requested and" in str(error) else error.errno
        return number if number in _DISK_PROBLEMS else None

    def _refused(self, number: int | None) -> ArtifactError:
        written = 0
        with suppress(OSError):
            written = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        there = next(parent for parent in self.path.absolute().parents if parent.exists())
        reason = "its folder was deleted meanwhile" if number == errno.ESTALE else os.strerror(number or errno.EIO)
        if number in _FULL:
            free = shutil.disk_usage(there).free / 1e6
            reason += f" ({written / 1e6:.1f} MB of it were written, {free:.1f} MB are free)"
        return ArtifactError(
            f"{self.path} cannot be written: {reason}. What was there before is as it was. {disk_remedy(number)}, or choose "
            "another output folder; the same command goes on where it was."
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what writers to `folder` left behind when they were killed; what one is writing now is never touched."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with suppress(OSError):  # it has just gone, or is on a disk without locks or another user's: it stays
            lock = try_lock(leftover / LOCK)
            if lock is not None:
                _clear(leftover)
                _remove(leftover, lock)


def _clear(folder: Path) -> None:
    """Empty a temporary folder but for its lock, after what a kill between two renames left undone."""
    entries = {entry.name: entry for entry in folder.iterdir() if entry.name != LOCK} if folder.is_dir() else {}
    if _REPLACED in entries:
        for name, entry in entries.items():
            target = folder.parent / name
            if name != _REPLACED and not target.exists():
                entry.replace(target)  # it was complete before the old one was moved away
    for entry in entries.values():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _remove(folder: Path, lock: int | None) -> None:
    """Remove an empty temporary folder and give its lock back, the lock's file last: whoever has it owns the folder."""
    if lock is not None:
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(lock)
    with suppress(OSError):  # the next writer is in it already
        folder.rmdir()


def _publish(path: Path) -> None:
    """Make a new file as readable as its folder (some writers make private files), and flush it."""
    if path.is_file():
        path.chmod(0o666 & path.parent.stat().st_mode)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
