"""Disks that refuse a file: said in one sentence, whichever library met it, and what was there stays."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.locks import LOCK
from compile_steer.artifacts.tensors import save_tensors
from compile_steer.artifacts.writing import new_file, new_folder
from compile_steer.common.errors import ArtifactError, LayoutError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files, which the system reports to a writer much as it does a full disk."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN, "Python ignores the signal, so that write() fails"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _torch(path: Path) -> None:
    with new_file(path) as temporary:
        torch.save(torch.zeros(100_000), temporary)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_text(path, "x" * 100_000),
        lambda path: save_tensors(path, {"x": torch.zeros(100_000)}, {}),
        _torch,
    ],
    ids=["text", "safetensors", "torch"],
)
def test_a_disk_that_refuses_a_file_is_said_and_leaves_the_old_one(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ArtifactError, match=rf"{path} cannot be written: .* MB of it were written, .* MB are free"):
        write(path)
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), ArtifactError),
        (Exception("No space left on device (os error 28)"), ArtifactError),  # tokenizers
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), ArtifactError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ArtifactError),
        (OSError(errno.EMFILE, "Too many open files"), ArtifactError),
        (PermissionError(errno.EACCES, "Permission denied", "/a/base/model.safetensors"), PermissionError),
        (SafetensorError("Error while deserializing header: header too large"), SafetensorError),
        (RuntimeError("something else"), RuntimeError),
        (LayoutError("model cannot be loaded (os error 28)"), LayoutError),
    ],
    ids=repr,
)
def test_only_an_error_of_the_disk_is_called_one(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, new_folder(tmp_path / "a"):
        raise error
    assert type(caught.value) is kind
    assert names(tmp_path) == []


def test_a_temporary_that_is_deleted_midway_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="its folder was deleted meanwhile"),
        new_file(tmp_path / "out" / "a") as new,
    ):
        new.write_text("x")
        new.unlink()
        (new.parent / LOCK).unlink()
        new.parent.rmdir()


def test_a_folder_in_the_place_of_a_file_is_said_by_the_file_s_name(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/a cannot be written: Is a directory"):
        save_text(tmp_path / "a", "x")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("left", range(4))
def test_too_many_open_files_is_said_wherever_the_limit_is_met(tmp_path: Path, left: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened: list[int] = []
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 8, hard)
    )
    try:
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in opened[:left]:
            os.close(descriptor)
        message = ""
        try:
            save_text(tmp_path / "a", "x")
        except ArtifactError as error:
            message = str(error)
    finally:
        for descriptor in opened[left:]:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert f"{tmp_path}/a cannot be written: Too many open files" in message or (not message and left > 1)
