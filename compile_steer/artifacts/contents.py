"""What lies in a file or folder, by SHA-256, and whether it stays so while it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from compile_steer.artifacts.files import forget_hashes, own_files, sha256
from compile_steer.common.errors import ArtifactError


def file_hashes(path: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of each file of a folder by its relative name, in order; of a file, its own under the name ''.

    Args:
        without: names of files directly in the folder that do not count (reports about it).
    """
    return {name: sha256(path / name) for name in _names(path, without)}


def _names(path: Path, without: Sequence[str]) -> list[str]:
    if path.is_dir():
        return [name for name in own_files(path) if name not in without]
    return [""] if path.exists() else []


@contextmanager
def unchanged(path: Path, without: Sequence[str] = ()) -> Iterator[Mapping[str, str]]:
    """Yield `file_hashes` of what is read in the block; raises `ArtifactError` at its end if anything was written there.

    A file that was changed and put back is noticed too: the kernel notes the time of every write, and no program sets it.
    """
    # The times first: what is written while the hashes are computed is then later than they are.
    times, hashes = _times(path, without), file_hashes(path, without)
    yield hashes
    forget_hashes()
    times_now, hashes_now = _times(path, without), file_hashes(path, without)
    changed = {name for name, _time in times.items() ^ times_now.items()}
    changed |= {name for name, _hash in hashes.items() ^ hashes_now.items()}
    if changed:
        names = ", ".join(str(path / name) for name in sorted(changed))
        raise ArtifactError(
            f"{names} changed while it was measured: what was measured is not what lies there. Nothing was recorded; "
            "let nothing write there, and run this again."
        )


def _times(path: Path, without: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of each file."""
    paths = {name: path / name for name in _names(path, without)}
    states = {name: file.stat() if file.exists() else file.lstat() for name, file in paths.items()}
    return {name: (state.st_ino, state.st_ctime_ns) for name, state in states.items()}
