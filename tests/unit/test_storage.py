"""What fsspec reaches as the storage of a fleet: whole or not there, newer work never lost, one message for what is wrong."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from compile_steer.__main__ import main
from compile_steer.artifacts.contents import file_hashes
from compile_steer.artifacts.storage import put_table, synced
from compile_steer.common.errors import ArtifactError

FILES = {
    "vectors/tide.safetensors": b"v1",
    "merged/tide-bias-fp32/compile_steer.json": b"record",
    "merged/tide-bias-fp32/model.safetensors": b"w1" * 1000,
}


def machine(root: Path, files: dict[str, bytes]) -> Path:
    """The folder of one recipe on a machine of its own."""
    for name, content in files.items():
        (root / "tide" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tide" / name).write_bytes(content)
    return root / "tide"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Storage that a fleet has begun to use."""
    put_table(f"file://{tmp_path}/there", {"rows": []})
    return f"file://{tmp_path}/there"


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_folder_that_was_put_is_the_same_on_another_machine(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://{tmp_path}/there"
    put_table(url, {"rows": []})
    one, other = machine(tmp_path / "one", FILES), tmp_path / "other" / "tide"
    with synced(one, url):
        (one / "made.json").write_text("{}")
    with synced(other, url):
        assert file_hashes(other) == file_hashes(one)
        (other / "made.json").unlink()
        (other / "vectors/tide.safetensors").write_bytes(b"v2")
    assert protocol == "memory" or not (tmp_path / "there/tide/made.json").exists()
    with synced(one, url):  # what was changed there and not here
        assert (one / "vectors/tide.safetensors").read_bytes() == b"v2"


def test_of_a_killed_upload_nothing_passes_for_finished(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, order, put_file = machine(tmp_path / "one", FILES), list[str](), LocalFileSystem.put_file
    with synced(one, url):
        pass

    def logged(self: Any, source: str, target: str) -> None:
        order.append(Path(target).name)
        put_file(self, source, target)

    def killed(self: Any, source: str, target: str) -> None:
        logged(self, source, target)
        if len(order) == 2:
            Path(target).write_bytes(b"half")
            raise KeyboardInterrupt

    for name in FILES:
        (one / name).write_bytes(b"other")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFileSystem, "put_file", killed)
        with synced(one, url):
            (one / "made.json").write_text("{}")
    other = tmp_path / "other" / "tide"
    with synced(other, url):
        assert file_hashes(other) == {}  # all of it was being written
    with synced(one, url):
        assert {(one / name).read_bytes() for name in FILES} == {b"other"}
    with synced(other, url):
        assert file_hashes(other) == file_hashes(one)
    order.clear()
    (one / "merged/tide-bias-fp32/z.json").write_text("later by name than the record")
    (one / "merged/tide-bias-fp32/compile_steer.json").write_text("new record")
    monkeypatch.setattr(LocalFileSystem, "put_file", logged)
    with synced(one, url):
        pass
    assert order == ["z.json", "compile_steer.json"]


def test_what_is_newer_here_stays_and_what_is_missing_is_fetched(url: str, tmp_path: Path) -> None:
    one, other = machine(tmp_path / "one", FILES), tmp_path / "other" / "tide"
    for folder in (one, other):
        with synced(folder, url):
            pass
    (other / "vectors/tide.safetensors").write_bytes(b"theirs")
    with synced(other, url):
        pass
    (one / "vectors/tide.safetensors").write_bytes(b"ours, not put when the storage was lost")
    (one / "merged/tide-bias-fp32/model.safetensors").unlink()
    with synced(one, url):
        assert (one / "vectors/tide.safetensors").read_bytes().startswith(b"ours")
        assert (one / "merged/tide-bias-fp32/model.safetensors").exists()


def test_what_another_fleet_put_meanwhile_is_not_overwritten(url: str, tmp_path: Path) -> None:
    one, other = machine(tmp_path / "one", FILES), machine(tmp_path / "other", {"vectors/tide.safetensors": b"theirs"})
    with (
        pytest.raises(ArtifactError, match="there/tide was changed by another fleet meanwhile"),
        synced(one, url),
        synced(other, url),
    ):
        pass
    assert (tmp_path / "there/tide/vectors/tide.safetensors").read_bytes() == b"theirs"
    assert (one / "vectors/tide.safetensors").read_bytes() == b"v1"
    with synced(one, url):  # the same command goes on
        pass


def test_storage_that_was_lost_or_damaged_is_named(url: str, tmp_path: Path) -> None:
    one, there = machine(tmp_path / "one", FILES), tmp_path / "there"
    with pytest.raises(ArtifactError, match=f"{url} was lost: its fleet.json is gone"), synced(one, url):
        there.rename(tmp_path / "away")
    assert (one / "vectors/tide.safetensors").exists() and not there.exists()
    said = list[str]()
    put_table(url, {"rows": []}, said.append)  # is not put into a folder below which nothing is mounted
    assert "was lost" in said[0] and not there.exists()
    (tmp_path / "away").rename(there)
    with synced(one, url):
        pass
    (there / "tide/vectors/tide.safetensors").write_bytes(b"rotten")
    with (
        pytest.raises(ArtifactError, match="tide/vectors/tide.safetensors is not the file that was put there. Remove"),
        synced(tmp_path / "other" / "tide", url),
    ):
        pass
    (there / "tide/files.json").write_text(json.dumps({"../../out.json": "0"}))
    with pytest.raises(ArtifactError, match="lies outside of"), synced(tmp_path / "other" / "tide", url):
        pass
    (there / "tide/files.json").write_text('{"vectors/tide.safe')  # a list of which half was written
    with synced(one, url):
        pass
    assert json.loads((there / "tide/files.json").read_text()) == file_hashes(one)


def test_a_list_that_cannot_be_read_is_not_taken_for_none(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cat_file = machine(tmp_path / "one", FILES), LocalFileSystem.cat_file

    def cat(self: LocalFileSystem, path: str, *values: Any, **named: Any) -> bytes:
        if path.endswith("files.json"):
            raise OSError(errno.EIO, "Input/output error")
        return bytes(cat_file(self, path, *values, **named))

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat)
    with pytest.raises(ArtifactError, match="cannot be read .*Input/output error"), synced(folder, url):
        pass


def test_storage_that_refuses_while_it_is_written_to_is_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    one = machine(tmp_path / "one", FILES)
    monkeypatch.setattr(LocalFileSystem, "put_file", refused)
    expected = f"{url} cannot be written to .*Read-only file system.*Nothing that lies on this machine is lost"
    with pytest.raises(ArtifactError, match=expected), synced(one, url):
        pass
    monkeypatch.setattr(LocalFileSystem, "pipe_file", refused)
    with pytest.raises(ArtifactError, match=f"{url} cannot be written to"):
        put_table(url, {})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--store", "somewhere"], "--store somewhere is no URL. Needed: s3://BUCKET/FOLDER"),
        (["--store", "nothing://b/x"], "nothing://b/x cannot be opened (Protocol not known: nothing). Needed: storage"),
        (["--store", "s3://b/x"], "s3://b/x cannot be opened (Install s3fs to access S3)"),
        (["--store", f"file://{__file__}/x"], f"{__file__}/x cannot be written to ([Errno 20] Not a directory"),
        (["--out", "s3://b/x"], "--out s3:/b/x looks like a URL; name that as --store"),
    ],
    ids=lambda value: value[1][:9] if isinstance(value, list) else "",
)
def test_what_cannot_be_storage_is_refused_before_the_work(
    options: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    recipe = Path(__file__).parents[2] / "recipes" / "ocean.yaml"
    monkeypatch.setattr(sys, "argv", ["compile-steer", "fleet", str(recipe), *options])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in said
    assert expected in " ".join(said.split())
    assert list(tmp_path.iterdir()) == []
