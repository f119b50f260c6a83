"""One writer at a time: output folders, temporaries of dead and living writers, and disks that refuse."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.locks import LOCK, for_child, locked, try_lock
from compile_steer.artifacts.writing import new_file, new_folder, remove_leftovers
from compile_steer.common.errors import ArtifactError

HOLD = """
import sys
from pathlib import Path
from compile_steer.artifacts.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
WRITE = """
import sys
from pathlib import Path
from compile_steer.artifacts.writing import new_folder
with new_folder(Path(sys.argv[1])) as new:
    (new / "half").write_text("x")
    print("held", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(script: str, path: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that has got as far as to print a line, and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# ------------------------------------------------------------------------------------ output folders


def test_a_second_process_is_told_who_holds_the_folder_until_that_one_dies(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path / "out")
    try:
        with pytest.raises(ArtifactError, match=rf"in use by process {process.pid} on .* since .* \(command: '-c"):
            locked(tmp_path / "out").__enter__()
    finally:
        kill(process)
    assert names(tmp_path / "out") == [LOCK], "a killed process leaves the file, but not the lock"
    with locked(tmp_path / "out"):
        about = json.loads((tmp_path / "out" / LOCK).read_bytes())
        assert about["pid"] == os.getpid()
    assert names(tmp_path / "out") == []


def test_the_folders_that_a_lock_made_go_with_it_where_they_are_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with locked(tmp_path / "a" / "b"):
        save_text(tmp_path / "a" / "c", "")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["c"]


def test_a_thread_may_take_its_own_lock_again_and_no_other_thread_may(tmp_path: Path) -> None:
    problems: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path):
                pass
        except ArtifactError as error:
            problems.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / ".." / tmp_path.name):
            pass
        assert (tmp_path / LOCK).exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(problems) == 1 and "in use by this process" in problems[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": "\x1b[31m", "host": {}}', b"[" * 9_000])
def test_a_lock_file_of_any_content_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        pass
    (tmp_path / LOCK).write_bytes(content)
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="in use by") as caught:
            locked(tmp_path).__enter__()
        assert "\x1b" not in str(caught.value)


def test_a_folder_that_is_deleted_midway_is_an_error_and_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match="was deleted, moved or replaced"), locked(out):
        (out / LOCK).unlink()
        out.rmdir()
        with pytest.raises(ArtifactError, match="was deleted, moved or replaced"):
            save_text(out / "deep" / "a", "")
    assert names(tmp_path) == []
    with pytest.raises(ArtifactError, match="was deleted"), locked(out):
        out.rename(tmp_path / "moved")
        out.mkdir()


def test_a_child_works_under_its_parent_s_lock_and_ends_with_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert start(HOLD, tmp_path, **for_child()).communicate("")[0] == "", "and leaves the lock"
        assert (tmp_path / LOCK).exists()
    parent = start(PARENT, tmp_path)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    kill(parent)
    for _ in range(200):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("the child outlived its parent")


PARENT = f"""
import os, subprocess, sys
from pathlib import Path
from compile_steer.artifacts.locks import for_child, locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", {HOLD!r}, sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | for_child())
    child.stdout.readline()
    print("held", child.pid, sep="\\n", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_on_a_disk_without_locks_a_command_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".writing-b").mkdir()
    with locked(tmp_path):
        save_text(tmp_path / "a", "new")
        save_text(tmp_path / "a", "newer")
    assert "without locks" in capsys.readouterr().err
    assert (tmp_path / "a").read_text() == "newer"
    assert ".writing-b" in names(tmp_path), "nobody can tell whose it is"


# ---------------------------------------------------------------------------------------- temporaries


def test_a_living_writer_s_temporary_stays_and_a_dead_one_s_goes(tmp_path: Path) -> None:
    process = start(WRITE, tmp_path / "a")
    try:
        save_text(tmp_path / "b", "")
        assert (tmp_path / ".writing-a" / "a" / "half").exists()
    finally:
        kill(process)
    assert names(tmp_path) == [".writing-a", "b"]
    save_text(tmp_path / "c", "")
    assert names(tmp_path) == ["b", "c"]


def test_two_writers_of_one_folder_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compile_steer.artifacts.writing._PATIENCE", 0.05)
    process = start(WRITE, tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"a is being written by another process"), new_folder(tmp_path / "a"):
        pass
    output, _errors = process.communicate("")
    assert output == "" and names(tmp_path) == ["a"] and names(tmp_path / "a") == ["half"]


def test_a_second_writer_of_a_file_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        save_text(tmp_path / "a", "second")
        order.append("second")

    with new_file(tmp_path / "a") as temporary:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        temporary.write_text("first")
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert (tmp_path / "a").read_text() == "second" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("published", [False, True])
def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, published: bool) -> None:
    """Where the system cannot exchange folders, the old one is moved away before the new one takes its place."""
    place = tmp_path / ".writing-a"
    (place / ".old").mkdir(parents=True)
    new = tmp_path / "a" if published else place / "a"
    new.mkdir()
    (new / "whole").write_text("x")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["whole"]


def test_a_lock_whose_file_was_deleted_is_taken_on_the_new_file(tmp_path: Path) -> None:
    first = try_lock(tmp_path / "lock")
    assert first is not None and try_lock(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()
    second = try_lock(tmp_path / "lock")
    assert second is not None
    os.close(first)
    os.close(second)


def test_a_place_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written.*File exists"):
        save_text(tmp_path / "file" / "a", "")
    with pytest.raises(
        ArtifactError, match=r"file cannot be written to \(it is no folder\)\. Remove what is in the way"
    ):
        locked(tmp_path / "file").__enter__()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ArtifactError, match=r"loop cannot be written to \(it is no folder\)"):
        locked(tmp_path / "loop").__enter__()
    assert sorted(names(tmp_path)) == ["file", "loop"]
