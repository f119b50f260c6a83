"""A model's revision follows everything that decides what it computes, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compile_steer.artifacts.revision import join_revision, other_revision
from compile_steer.common.errors import ArtifactError, CompileSteerError
from compile_steer.models.load import load
from compile_steer.models.source import revision_of
from compile_steer.steering.program import Program
from tests.helpers.tiny import build, chat_tokenizer, intervention

WEIGHTS, SETTINGS = (
    "other weights",
    "the same weights with another configuration, tokenizer, chat template or generation",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "m"
    build("llama").save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def in_json(name: str, change: Callable[[dict[str, Any]], object], **form: Any) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content, **form), encoding="utf-8")

    return apply


def appended(name: str, text: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return apply


def one_value(folder: Path) -> None:
    content = load_file(folder / "model.safetensors")
    content["model.norm.weight"][3] += 1e-6
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one value": (one_value, WEIGHTS),
    "other model": (lambda folder: build("llama", seed=1).save_pretrained(folder), WEIGHTS),
    "epsilon": (in_json("config.json", lambda c: c.update(rms_norm_eps=1e-3)), SETTINGS),
    "rope": (in_json("config.json", lambda c: c.update(rope_theta=5.0)), SETTINGS),
    "nested rope": (in_json("config.json", lambda c: c["rope_parameters"].update(rope_theta=5.0)), SETTINGS),
    "template": (appended("chat_template.jinja", " "), SETTINGS),
    "further template": (appended("additional_chat_templates/tool_use.jinja", "{{ x }}"), SETTINGS),
    "vocabulary": (in_json("tokenizer.json", lambda c: c["model"]["vocab"].update(w7=8, w8=7)), SETTINGS),
    "order of merges": (appended("merges.txt", "a b\n"), SETTINGS),
    "end of text": (in_json("tokenizer_config.json", lambda c: c.update(eos_token="w9")), SETTINGS),
    "generation": (in_json("generation_config.json", lambda c: c.update(eos_token_id=9)), SETTINGS),
    "sentencepiece": (appended("tokenizer.model", "x"), SETTINGS),
}


@pytest.mark.parametrize("case", CHANGES)
def test_whatever_changes_the_computation_changes_the_revision(tmp_path: Path, original: Path, case: str) -> None:
    change, difference = CHANGES[case]
    shutil.copytree(original, tmp_path / "m")
    change(tmp_path / "m")
    assert other_revision(revision_of(str(original)), revision_of(str(tmp_path / "m"))).startswith(difference)


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    build("llama").save_pretrained(folder, max_shard_size="20KB")


NO_CHANGES: dict[str, Callable[[Path], object]] = {
    "copy": lambda _folder: None,
    "spaces and order": in_json("config.json", lambda c: c.update(reversed(list(c.items()))), indent=7, sort_keys=True),
    "escapes": in_json("tokenizer.json", lambda _c: None, ensure_ascii=True),
    "library": in_json("config.json", lambda c: c.update(transformers_version="4.0")),
    "path": in_json("config.json", lambda c: c.update(_name_or_path="/elsewhere")),
    "shards": sharded,
    "side files": appended("README.md", "kept?"),
    "report": appended("parity.json", "{}"),
    "stale shard": appended("model-00001-of-00002.safetensors", "?"),
}


@pytest.mark.parametrize("case", NO_CHANGES)
def test_what_does_not_count_leaves_the_revision_as_it_is(tmp_path: Path, original: Path, case: str) -> None:
    shutil.copytree(original, tmp_path / "m")
    NO_CHANGES[case](tmp_path / "m")
    assert revision_of(str(tmp_path / "m")) == revision_of(str(original))


def test_identity_is_the_revision_and_not_the_path(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(original, tmp_path / "moved" / "m")
    program = Program((intervention(),), str(original), revision_of(str(original)))
    monkeypatch.chdir(tmp_path / "moved")
    for name in ("m", "./m", "m/", "../moved/m", str(tmp_path / "moved" / "m")):
        read = load(name if name != "m" else "./m", device="cpu")
        read.layout.require_program(program, read.id, read.revision)
    appended("chat_template.jinja", " ")(Path("m"))
    edited = load("./m", device="cpu")
    with pytest.raises(ArtifactError, match=SETTINGS):
        edited.layout.require_program(program, edited.id, edited.revision)


def test_snapshot_of_the_hub_is_the_same_model_as_a_copy_of_it() -> None:
    here, hub = join_revision("a1", "b2"), join_revision("a1", "b2", "c3")
    assert hub == "hub:c3+sha256:a1+settings:b2"
    assert other_revision(hub, here) == other_revision(here, hub) == ""
    assert other_revision(hub, join_revision("a1", "b2", "c4")) == "", "another commit of the same content"
    assert other_revision(hub, join_revision("a1", "b9", "c3")).startswith(SETTINGS), "an edited cache"


@pytest.mark.parametrize(
    ("recorded", "found", "difference"),
    [
        ("sha256:a1", "sha256:a1+settings:b2", ""),
        ("sha256:a2", "sha256:a1+settings:b2", WEIGHTS),
        ("hub:c3", "hub:c3+sha256:a1+settings:b2", ""),
        ("hub:c4", "hub:c3+sha256:a1+settings:b2", "another revision"),
        ("hub:c4", "sha256:a1+settings:b2", "another revision"),
        ("", "sha256:a1+settings:b2", "another revision"),
        ("sha256:a2+settings:b9", "sha256:a1+settings:b2", WEIGHTS),
    ],
)
def test_records_of_earlier_versions_are_compared_by_what_they_name(recorded: str, found: str, difference: str) -> None:
    assert other_revision(recorded, found) == difference


def test_value_is_hashed_and_not_its_place_in_the_file(tmp_path: Path) -> None:
    for name, order in (("a", ["x", "y"]), ("b", ["y", "x"])):
        (tmp_path / name).mkdir()
        save_file({key: torch.tensor([float(ord(key))]) for key in order}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    assert revision_of(str(tmp_path / "a")) == revision_of(str(tmp_path / "b"))


LINKED = ("tokenizer.json", "config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja", "merges.txt")


@pytest.mark.parametrize("name", LINKED)
def test_link_out_of_the_folder_is_refused_and_its_text_not_shown(tmp_path: Path, original: Path, name: str) -> None:
    shutil.copytree(original, tmp_path / "m")
    (tmp_path / "secret").write_text("hunter2 {{ hunter2 }}", encoding="utf-8")
    file = tmp_path / "m" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(CompileSteerError, match=rf"{name} is a link to .*secret, outside of the folder") as refused:
        load(str(tmp_path / "m"), device="cpu")
    assert "hunter2" not in str(refused.value)


def test_snapshot_of_the_hub_is_loaded_by_its_links(tmp_path: Path, original: Path) -> None:
    shutil.copytree(original, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    for file in original.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load(str(snapshot), device="cpu").revision == load(str(original), device="cpu").revision


def test_file_that_claims_a_terabyte_is_not_read(tmp_path: Path, original: Path) -> None:
    shutil.copytree(original, tmp_path / "m")
    with (tmp_path / "m" / "tokenizer.model").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ArtifactError, match=r"tokenizer\.model .*it has 1,000,000,000,000 bytes; at most"):
        revision_of(str(tmp_path / "m"))
