"""Atomic writes: the old artifact or the new one, never half, and nothing left beside them."""

from __future__ import annotations

import ctypes
import json
import math
import os
from pathlib import Path

import pytest
import torch

from compile_steer.artifacts import files
from compile_steer.artifacts.contents import file_hashes, unchanged
from compile_steer.artifacts.files import digest, edit_check, save_json, save_record, save_text, sha256, was_edited
from compile_steer.artifacts.tensors import read_tensors, save_tensors
from compile_steer.artifacts.writing import new_file, new_folder
from compile_steer.common.errors import ArtifactError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------- files


def test_a_new_file_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with new_file(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert not path.exists()
        assert temporary.stat().st_dev == path.parent.stat().st_dev, "a rename is atomic on one disk only"
    assert path.read_text(encoding="utf-8") == "new"
    assert names(path.parent) == ["a.txt"]


def test_an_error_midway_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), new_file(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_interrupt_midway_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_text(tmp_path / "a.txt", "x")
        with new_folder(tmp_path / "folder") as new:
            fill(new, a="x")
            (new / "a").chmod(0o600)
        assert os.umask(0o027) == 0o027, "the umask is put back"
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {"a.txt": "0o640", "folder": "0o750", "a": "0o640"}


def test_text_is_utf_8_and_json_refuses_what_no_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_json(path, {"a": [1.5, "é"]})
    assert json.loads(path.read_bytes().decode("utf-8")) == {"a": [1.5, "é"]}
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            save_json(path, {"a": bad})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.5, "é"]}
    assert names(tmp_path) == ["a.json"]


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(3.0)}, {"about": "x"})
    with pytest.raises(Exception, match="invalid|expected|Tensor"):
        save_tensors(path, {"x": "no tensor"}, {})  # type: ignore[dict-item]  # on purpose
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert metadata == {"about": "x"}
    assert names(tmp_path) == ["a.safetensors"]


# ------------------------------------------------------------------------------------------- folders


def test_a_new_folder_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with new_folder(path) as temporary:
        fill(temporary, a="1")
        fill(temporary / "inner", b="2")
        assert not path.exists()
    assert names(path) == ["a", "inner"]
    assert (path / "inner" / "b").read_text(encoding="utf-8") == "2"
    assert names(path.parent) == ["folder"]


def exchange(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, old="1", both="old")
    with new_folder(path) as temporary:
        fill(temporary, new="2", both="new")
        assert names(path) == ["both", "old"]
    assert names(path) == ["both", "new"], "no file of the old folder stays"
    assert (path / "both").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["folder"]


def test_a_folder_is_exchanged_as_a_whole(tmp_path: Path) -> None:
    exchange(tmp_path)


@pytest.mark.parametrize("missing", ["function", "support"])
def test_a_folder_is_replaced_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    class Libc:
        def __init__(self, *_args: object, **_kwargs: object) -> None:
            if missing == "support":
                self.renameat2 = lambda *_args: -1

    monkeypatch.setattr(ctypes, "CDLL", Libc)
    exchange(tmp_path)


def test_an_error_midway_leaves_the_old_folder_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, old="1")
    with pytest.raises(ZeroDivisionError), new_folder(path) as temporary:
        fill(temporary, new="2")
        raise ZeroDivisionError
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


# -------------------------------------------------------------------------------------------- hashes


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_that_nobody_changed_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "weights", list[Path]()
    path.write_text("abc")
    content_sha256 = files._content_sha256

    def counted(file: Path) -> str:
        read.append(file)
        return content_sha256(file)

    monkeypatch.setattr(files, "_content_sha256", counted)
    assert sha256(path) == sha256(path) and len(read) == 2  # just written: its time may not tell the next write
    monkeypatch.setattr(files, "_SETTLED", -1e9)
    first = sha256(path)
    assert sha256(path) == first and len(read) == 3
    times = path.stat()
    path.write_text("abd")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256(path) != first and len(read) == 4
    with unchanged(tmp_path):
        pass
    assert len(read) == 5  # before: kept; after: read again


def test_a_folder_s_hash_follows_names_and_contents_but_not_its_own_name_or_reports(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name, a="1", b="2")
        fill(tmp_path / name / "inner", c="3")
    first = sha256(tmp_path / "one")
    assert sha256(tmp_path / "two") == first
    fill(tmp_path / "two", report="about the folder")
    assert list(file_hashes(tmp_path / "two", without=("report",))) == ["a", "b", "inner/c"]
    assert sha256(tmp_path / "two") != first
    (tmp_path / "two" / "report").unlink()
    (tmp_path / "two" / "inner" / "c").rename(tmp_path / "two" / "inner" / "d")
    assert sha256(tmp_path / "two") != first
    fill(tmp_path / "one" / "inner", c="4")
    assert sha256(tmp_path / "one") != first


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert digest({"a": 1, "b": [2, "é"]}) != digest({"a": 1, "b": ["é", 2]})


# ---------------------------------------------------------------------------------------- edit check


def test_an_edit_by_hand_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_record(path, {"verdict": "fail", "effect": 0.1})
    assert not was_edited(path)
    recorded, actual = edit_check(path)
    assert recorded == actual == digest({"verdict": "fail", "effect": 0.1})
    path.write_text(path.read_text(encoding="utf-8").replace("fail", "pass"), encoding="utf-8")
    assert was_edited(path)
    assert edit_check(path) == (recorded, digest({"verdict": "pass", "effect": 0.1}))


def test_the_edit_check_is_no_protection_against_forgery(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_record(path, {"verdict": "fail"})
    save_record(path, {"verdict": "pass"})  # whoever computes the hash again leaves no trace
    assert not was_edited(path)


def test_a_record_that_lost_its_edit_check_was_edited_and_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_json(path, {"verdict": "fail"})
    assert was_edited(path)
    assert edit_check(path)[0] == ""
    for text in ("{", "[1]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError, match="is damaged"):
            was_edited(path)
