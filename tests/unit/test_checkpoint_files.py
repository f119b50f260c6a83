"""Which files are the model: those that transformers loads, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from compile_steer.artifacts.tensors import INDEX_FILE, SINGLE_FILE, Checkpoint, checkpoint_files, stream_tensors
from compile_steer.common.errors import ArtifactError
from tests.helpers.tiny import build

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path, weight_map: dict[str, str], files: dict[str, dict[str, Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    return folder


def sharded(folder: Path) -> Path:
    tensors = {FIRST: {"a": torch.zeros(2)}, SECOND: {"b": torch.ones(3)}}
    return write(folder, {"a": FIRST, "b": SECOND}, tensors)


def names(folder: Path) -> dict[str, list[str]]:
    return {file.name: tensors for file, tensors in checkpoint_files(folder).items()}


def test_index_names_the_files_and_whatever_lies_beside_them_is_ignored(tmp_path: Path) -> None:
    sharded(tmp_path)
    for name in ("consolidated.safetensors", "z-old.safetensors", "model-00001-of-00009.safetensors"):
        save_file({"a": torch.ones(2), "c": torch.ones(1)}, tmp_path / name)
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    assert names(tmp_path) == {FIRST: ["a"], SECOND: ["b"]}
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.files == {"a": tmp_path / FIRST, "b": tmp_path / SECOND}
    assert torch.equal(checkpoint.tensor("a"), torch.zeros(2))  # type: ignore[arg-type]  # it is there
    assert checkpoint.tensor("c") is None


def test_single_file_comes_before_an_index_as_in_transformers(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(checkpoint_files(tmp_path)) > 1
    stale = {name: value.clone() for name, value in build("llama", seed=1).state_dict().items()}
    save_file(stale, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    assert list(checkpoint_files(tmp_path)) == [tmp_path / SINGLE_FILE]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, Checkpoint(tmp_path).tensor(name))  # type: ignore[arg-type]  # it is there


def test_tensor_that_the_index_does_not_name_is_loaded_by_transformers_too(tmp_path: Path) -> None:
    write(tmp_path, {"a": FIRST}, {FIRST: {"a": torch.zeros(1), "b": torch.ones(1)}})
    assert names(tmp_path) == {FIRST: ["a", "b"]}


def test_snapshot_of_the_hub_cache_consists_of_links_to_its_blobs(tmp_path: Path) -> None:
    sharded(tmp_path / "models--x" / "blobs")
    snapshot = tmp_path / "models--x" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for name in (INDEX_FILE, FIRST, SECOND):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert names(snapshot) == {FIRST: ["a"], SECOND: ["b"]}
    (tmp_path / "here").symlink_to(snapshot)
    assert names(tmp_path / "here") == {FIRST: ["a"], SECOND: ["b"]}


def test_link_inside_the_folder_and_a_relative_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path / "m")
    (tmp_path / "m" / FIRST).rename(tmp_path / "m" / "shard.bin")
    (tmp_path / "m" / FIRST).symlink_to("shard.bin")
    monkeypatch.chdir(tmp_path)
    assert names(Path("m/")) == {FIRST: ["a"], SECOND: ["b"]}


def leave_by_dots(folder: Path) -> None:
    save_file({"b": torch.ones(3)}, folder.parent / "b.safetensors")
    write(folder, {"a": FIRST, "b": "../b.safetensors"}, {})


def leave_and_return(folder: Path) -> None:
    write(folder, {"a": FIRST, "b": f"../{folder.name}/{SECOND}"}, {})


def leave_by_an_absolute_path(folder: Path) -> None:
    save_file({"b": torch.ones(3)}, folder.parent / "b.safetensors")
    write(folder, {"a": FIRST, "b": str(folder.parent / "b.safetensors")}, {})


def leave_by_a_link(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / "b.safetensors")
    (folder / SECOND).symlink_to("../b.safetensors")


def leave_by_a_linked_folder(folder: Path) -> None:
    (folder.parent / "other").mkdir()
    (folder / SECOND).rename(folder.parent / "other" / SECOND)
    (folder / "sub").symlink_to("../other")
    write(folder, {"a": FIRST, "b": f"sub/{SECOND}"}, {})


def single_file_is_a_link(folder: Path) -> None:
    save_file({"a": torch.ones(3)}, folder.parent / "b.safetensors")
    (folder / SINGLE_FILE).symlink_to("../b.safetensors")


def with_header(file: Path, header: str) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))


def name_twice(folder: Path) -> None:
    tensor = '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(folder / SECOND, f"{{{tensor}, {tensor}}}")


def long_header(folder: Path) -> None:
    tensor = '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(folder / SECOND, f"{{{tensor}{' ' * 70_000_000}}}")


def index_is_a_link(folder: Path) -> None:
    (folder / INDEX_FILE).rename(folder.parent / "index.json")
    (folder / INDEX_FILE).symlink_to("../index.json")


def named(file: str) -> Callable[[Path], None]:
    return lambda folder: _write_text(folder / INDEX_FILE, json.dumps({"metadata": {}, "weight_map": {"a": file}}))


def circle(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)


def index_text(text: str) -> Callable[[Path], None]:
    return lambda folder: _write_text(folder / INDEX_FILE, text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def only(*kept: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in list(folder.iterdir()):
            file.unlink()
        for name in kept:
            save_file({"a": torch.ones(1)}, folder / name)

    return change


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (leave_by_dots, r"\.\./b\.safetensors lies outside .*names it"),
    (leave_and_return, "lies outside"),
    (leave_by_an_absolute_path, r"b\.safetensors lies outside"),
    (leave_by_a_link, "is a link to .*b.safetensors, outside of the folder. Copy the file there instead"),
    (leave_by_a_linked_folder, "is a link to"),
    (single_file_is_a_link, "model.safetensors is a link to"),
    (lambda folder: (folder / SECOND).unlink(), f"{SECOND} does not exist .*names it"),
    (lambda folder: (folder / SECOND).write_bytes(b"nothing"), f"{SECOND} is damaged"),
    (lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-1]), f"{SECOND} is damaged"),
    (lambda folder: write(folder, {"a": FIRST, "b": FIRST}, {}), f"names b in {FIRST}, which does not hold it"),
    (lambda folder: write(folder, {"a": FIRST, "b": SECOND, "c": SECOND}, {}), "names c in"),
    (lambda folder: save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / SECOND), "a lies in both"),
    (name_twice, f"{SECOND} is damaged: its header cannot be read .line 1, column .*: the key 'b' is given twice"),
    (long_header, f"{SECOND} is damaged: its header cannot be read .its header has 70,000,0"),
    (named("x\0y"), "is no name of a file .embedded null byte.* names it"),
    (named("x" * 5000), "is no name of a file .File name too long"),
    (circle, f"{SECOND}' is no name of a file|{SECOND} does not exist"),
    (index_is_a_link, "index.json is a link to .*outside of the folder"),
    (index_text("["), "is damaged"),
    (index_text("[]"), "needed: a JSON object"),
    (index_text("{}"), "metadata: missing; weight_map: missing"),
    (index_text('{"metadata": {}, "weight_map": {}}'), "Needed: an index of a model"),
    (index_text('{"metadata": {}, "weight_map": {"a": 1}}'), "Needed: an index of a model"),
    (index_text('{"metadata": {}, "weight_map": ["a"]}'), "Needed: an index of a model"),
    (index_text(f'{{"weight_map": {{"a": "{FIRST}"}}}}'), "Needed: an index of a model"),
    (only(), "holds no model.safetensors and no model.safetensors.index.json; only safetensors are read"),
    (only("consolidated.safetensors"), "consolidated.safetensors is not what transformers loads"),
    (only("model-00001-of-00002.safetensors"), "is not what transformers loads"),
    (only("pytorch_model.bin"), "only pytorch_model.bin: a pickle, which can run code when it is read"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED)
def test_folder_whose_files_are_not_one_model_is_refused(
    tmp_path: Path, change: Callable[[Path], object], problem: str
) -> None:
    change(sharded(tmp_path / "m"))
    with pytest.raises(ArtifactError, match=problem):
        checkpoint_files(tmp_path / "m")


def test_thousands_of_the_same_mistake_are_told_briefly_and_all_kinds_at_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    weight_map = {f"w{n}": FIRST for n in range(1000)}
    write(tmp_path, weight_map | {"gone": "gone.safetensors"}, {})
    with pytest.raises(ArtifactError, match=re.escape("996 more like this.")) as caught:
        checkpoint_files(tmp_path)
    assert "gone.safetensors does not exist" in caught.value.problems[0]
    assert len(caught.value.problems) == 7


def test_moved_copy_has_the_same_files(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    assert names(tmp_path / "copy") == names(tmp_path / "m")
    assert load_file(tmp_path / "copy" / FIRST).keys() == {"a"}


def test_file_that_is_cut_while_it_is_copied_gives_no_shorter_copy(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint(tmp_path)

    def copy() -> int:
        return stream_tensors(
            tmp_path / "copy", checkpoint.specs, lambda _name: torch.zeros(0), {}, checkpoint.places.get
        )

    assert copy() == 20
    assert torch.equal(load_file(tmp_path / "copy")["a"], torch.arange(5.0))
    (tmp_path / SINGLE_FILE).write_bytes((tmp_path / SINGLE_FILE).read_bytes()[:-6])
    with pytest.raises(ArtifactError, match=r"model\.safetensors was cut while it was read: 6 bytes from [\d,]+ on"):
        copy()
