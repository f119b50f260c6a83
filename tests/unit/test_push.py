"""What is sent to a hub is what was listed, and nothing goes that was not verified. No network: the hub is a stand-in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from typer.testing import CliRunner

from compile_steer.artifacts.files import sha256
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CompileSteerError, RecipeError
from compile_steer.tools.push import prepare, send
from tests.helpers.small_run import SmallRun

TARGET = "somebody/tide"


@dataclass
class Hub:
    """Stands in for `HfApi`."""

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, repo_type: str, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        assert (repo_type, exist_ok) == ("model", True)
        self.repositories[repo_id] = private

    def create_commit(self, repo_id: str, operations: Sequence[CommitOperationAdd], *, commit_message: str) -> str:
        assert repo_id in self.repositories
        assert "compile_steer" in commit_message
        for one in operations:
            assert isinstance(one.path_or_fileobj, str | Path)
            self.files[one.path_in_repo] = sha256(Path(one.path_or_fileobj))
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    one = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: one)
    return one


def push(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["push", *map(str, arguments), "--to", TARGET])


def test_without_yes_it_lists_and_does_nothing(run: SmallRun, hub: Hub) -> None:
    folder = run.paths.merged("bias", "fp32")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "left").touch()
    result = push(folder)
    assert result.exit_code == 0
    for name in ("model.safetensors", "README.md", "parity.json", "compile_steer.json"):
        assert name in result.output
        assert sha256(folder / name) in result.output
    for words in (TARGET, "private", "Nothing was sent. Add --yes", "compiled with --force", "licence", "local model"):
        assert words in result.output
    assert ".cache" not in result.output
    assert not hub.repositories


def test_with_yes_exactly_the_listed_files_are_sent(run: SmallRun, hub: Hub) -> None:
    folder = run.paths.merged("bias", "fp32")
    done = push(folder, "--yes", "--json")
    assert done.exit_code == 0
    listed = json.loads(done.stdout)
    assert listed["sent"] == f"https://hub/{TARGET}/commit/1"
    assert hub.repositories == {TARGET: True}
    assert hub.files == {file["name"]: file["sha256"] for file in listed["files"]}
    assert {path.name for path in folder.iterdir()} == hub.files.keys()
    push(folder, "--yes", "--public")
    assert hub.repositories == {TARGET: False}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("failed", "verification failed: KL"),
        ("missing", "parity.json is missing"),
        ("of another", "of other weights, or was edited"),
        ("edited", "of other weights, or was edited"),
        ("tampered", "config.json was changed"),
        ("data", "data train"),
    ],
)
def test_what_is_not_known_to_be_the_steered_model_is_refused(run: SmallRun, hub: Hub, case: str, words: str) -> None:
    paths = run.paths
    folder = paths.merged("bias", "fp32")
    if case == "failed":
        folder = paths.adapter("closed_form")
    elif case == "missing":
        (folder / "parity.json").unlink()
    elif case == "of another":
        shutil.copy(paths.adapter("closed_form") / "parity.json", folder / "parity.json")
    elif case == "edited":
        folder = paths.adapter("closed_form")
        content = json.loads((folder / "parity.json").read_text())
        (folder / "parity.json").write_text(json.dumps({**content, "passed": True, "reasons": []}))
    elif case == "tampered":
        (folder / "config.json").write_text("{}")
    else:
        (run.root / "recipes" / "data" / "train.jsonl").write_text("{}")
    result = push(folder, "--yes")
    assert result.exit_code == 1
    assert "refused" in result.output
    assert words in " ".join(result.output.split())
    assert "with --force" in result.output
    assert not hub.repositories
    forced = push(folder, "--yes", "--force")
    assert forced.exit_code == 0
    assert "in spite of" in forced.output
    assert hub.files


@pytest.mark.parametrize("target", ["tide", "a/b/c", "somebody/ti de", "--x/y"])
def test_a_target_that_is_no_repository_is_refused(run: SmallRun, target: str) -> None:
    with pytest.raises(RecipeError, match="--to"):
        prepare(run.paths.adapter("bias"), target, private=True)


def test_foreign_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not made by compile_steer"):
        prepare(tmp_path, TARGET, private=True)
    with pytest.raises(ArtifactError, match="does not exist"):
        prepare(tmp_path / "x", TARGET, private=True)


def test_what_changes_after_the_listing_is_not_sent(run: SmallRun) -> None:
    folder, hub = run.paths.merged("bias", "fp32"), Hub()
    upload = prepare(folder, TARGET, private=True)
    (folder / "README.md").write_text("another card")
    with pytest.raises(ArtifactError, match="README.md changed since it was listed"):
        send(upload, cast(HfApi, hub))
    assert not hub.repositories


def test_a_hub_that_refuses_is_a_message(run: SmallRun, hub: Hub) -> None:
    hub.error = ConnectionError("no route to host")
    result = push(run.paths.merged("bias", "fp32"), "--yes")
    assert isinstance(result.exception, CompileSteerError)
    assert "no route to host" in str(result.exception)
    assert "hf auth login" in str(result.exception)
