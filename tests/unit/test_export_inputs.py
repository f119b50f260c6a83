"""What travels with an export, whatever lies beside it; and what a disk that refuses a file leaves of one."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_steer.artifacts.files import sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.export.adapter import write_lora
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.tools.serving.export import export
from tests.helpers import byte_level
from tests.helpers.tiny import FFN, HIDDEN, intervention, program

DOWN = "model.layers.1.mlp.down_proj"
ENGINES = ("transformers", "vllm", "llama.cpp")
SECRET = "the secret"
# fmt: off
TRAVELS = {
    ("adapter", "transformers"): {"adapter_config.json", "adapter_model.safetensors", "export.json"},
    ("adapter", "vllm"): {"adapter_config.json", "adapter_model.safetensors", "export.json"},
    ("adapter", "llama.cpp"): {"adapter.lora.gguf", "export.json"},
    ("model", "transformers"): {
        "LICENSE", "chat_template.jinja", "config.json", "export.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    },
    ("model", "llama.cpp"): {"export.json", "model-f32.gguf"},
}
# fmt: on
TRAVELS["model", "vllm"] = TRAVELS["model", "transformers"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return byte_level.saved("llama", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def artifacts(base: LoadedModel, tmp_path: Path) -> dict[str, Path]:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_lora(adapter, {DOWN: LowRank(torch.ones(HIDDEN, 1), torch.ones(1, FFN))}, base.source, False)
    model = tmp_path / "model"
    model.symlink_to(base.source)
    steering = tmp_path / "steering.safetensors"
    program("llama", intervention(layer=1)).save(steering)
    return {"adapter": adapter, "model": model, "program": steering}


def litter(folder: Path) -> None:
    """Everything that a stranger's folder may hold beside its own files."""
    secret = folder.parent / "secret"
    secret.write_text(SECRET)
    (folder / "notes.txt").symlink_to(secret)
    (folder / "vocab").symlink_to(folder.parent, target_is_directory=True)
    (folder / "gone").symlink_to("nowhere")
    for name in ("evil.py", "id_rsa", ".env", "token.pem", "--out", "-rf", "a\nb", "optimizer.pt", "export.json.bak"):
        (folder / name).write_text(SECRET)
    (folder / "checkpoint-5" / "deep").mkdir(parents=True)
    (folder / "checkpoint-5" / "deep" / "adapter_model.safetensors").write_text(SECRET)
    with (folder / "README.md").open("wb") as readme:
        readme.truncate(100_000_000)
    os.mkfifo(folder / "pipe")


@pytest.mark.parametrize(("kind", "engine"), TRAVELS)
def test_only_what_is_listed_travels(
    kind: str, engine: Any, base: LoadedModel, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = artifacts[kind]
    if kind == "model":
        folder.unlink()
        folder.mkdir()
        for file in Path(base.source).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "LICENSE").write_text("free")
    litter(folder)
    exported = export(folder, engine, tmp_path / "out", precision="f32")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert found == set(exported.files) <= TRAVELS[kind, engine]
    assert found >= TRAVELS[kind, engine] - {"chat_template.jinja", "generation_config.json"}
    for name in found:
        path = tmp_path / "out" / name
        assert not path.is_symlink()
        assert SECRET.encode() not in path.read_bytes()


def test_a_pipe_in_a_folder_has_a_hash_and_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe")
    one = sha256(tmp_path / "a")
    (tmp_path / "a" / "pipe").unlink()
    assert sha256(tmp_path / "a") != one


@pytest.fixture
def small_files(artifacts: dict[str, Path]) -> Iterator[None]:
    """A limit on the size of files, once the artifacts are there; the system reports it much as it does a full disk."""
    assert artifacts
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["adapter", "model", "program"])
def test_a_disk_that_refuses_a_file_leaves_the_earlier_export(
    kind: str, engine: Any, base: LoadedModel, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    if (kind, engine) == ("program", "transformers"):
        pytest.skip("transformers has no file of a program")
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text(json.dumps({"old": True}))
    with pytest.raises(
        ArtifactError, match=rf"^{out}(/[\w.-]+)? cannot be written: (File too large|No space left)"
    ) as caught:
        export(artifacts[kind], engine, out, base.source, precision="f32")
    assert ".writing" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["export.json"]
    assert json.loads((out / "export.json").read_text()) == {"old": True}
    assert not list(tmp_path.glob(".writing*"))
