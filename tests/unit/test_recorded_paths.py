"""What an artifact records of paths and addresses is followed only below the folder that the user looks in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compile_steer.artifacts.paths import RunPaths, require_inside
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError
from compile_steer.tools.lineage import recorded_recipe
from compile_steer.tools.reproduce import recalled_recipe

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": "x",
    "data": {"train": "data/a.jsonl", "validation": "data/b.jsonl", "test": "data/c.jsonl"},
    "validate": {"layers": [1], "coefficients": [1.0], "score": {"kind": "keywords", "patterns": ["x"]}},
}


def test_own_paths_are_followed(tmp_path: Path) -> None:
    recipe = recorded_recipe(RECIPE, tmp_path)
    assert recipe.folder == tmp_path.resolve()
    absolute = {**RECIPE, "data": {**RECIPE["data"], "train": str(tmp_path / "data" / "a.jsonl")}}
    recorded_recipe(absolute, tmp_path)
    recorded_recipe({**RECIPE, "data": {**RECIPE["data"], "train": "/etc/passwd"}}, Path("/"))  # the user's word


_KEYWORDS = RECIPE["validate"]["score"]
_CLASSIFIER = {"kind": "classifier", "model": "/home", "label": "x"}


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"train": "/etc/passwd"}),
        ("data", {"neutral": "../../../etc/passwd"}),
        ("data", {"heldout": "data/link.jsonl"}),
        ("data", {"train": {"source": "json", "data_files": ["/etc/passwd"]}}),
        ("data", {"train": {"source": "json", "data_files": ["../x.json"]}}),
        ("data", {"train": {"source": "json", "data_files": ["/etc/passwd", "data/a.json"]}}),
        ("data", {"train": {"source": "json", "data_files": ["http://169.254.169.254/x"]}}),
        ("data", {"train": {"source": "/etc"}}),
        ("extract", {"method": "imported", "imported": {"file": "/etc/passwd"}}),
        ("validate", {"other_behaviour": "../x.jsonl"}),
        ("validate", {"score": _CLASSIFIER}),
        ("validate", {"score": {**_CLASSIFIER, "model": "~/secret"}}),
        ("validate", {"score": {"kind": "all", "all_of": [_KEYWORDS, _CLASSIFIER]}}),
    ],
)
def test_paths_that_lead_elsewhere_are_not_followed(section: str, change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jsonl").symlink_to("/etc/passwd")
    record = {**RECIPE, section: {**RECIPE.get(section, {}), **change}}
    with pytest.raises(ArtifactError, match="the artifact records"):
        recorded_recipe(record, tmp_path)


@pytest.mark.parametrize("model", ["/etc", "..", "~", "./link", "data/../../x", "../gone.gguf"])
def test_a_recorded_model_is_loaded_from_the_current_folder_alone(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "here" / "link").symlink_to("/etc")
    (tmp_path / "here" / "data").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    record = {**RECIPE, "model": model}
    with pytest.raises(ArtifactError, match=r"model: the artifact records .*outside.*\(--model \S+\)"):
        recalled_recipe(tmp_path / "a", record, tmp_path / "here" / "data", None)
    assert recalled_recipe(tmp_path / "a", record, tmp_path / "here", "mine").model == "mine"
    for allowed in ("data", str(tmp_path / "here" / "data"), "owner/name", "smollm2-135m-instruct"):
        recipe = recalled_recipe(tmp_path / "a", {**record, "model": allowed}, tmp_path / "here", None)
        assert recipe.model == allowed


@pytest.mark.parametrize("command", [["show"], ["reproduce"], ["push", "--to", "a/b"]])
def test_recipes_names_a_folder(command: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*command, str(tmp_path), "--recipes", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "nowhere is no folder" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("name", ["../x", "/etc/x", "..", "a/b", "a\0b"])
def test_recorded_names_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lead out of"):
        RunPaths(tmp_path, name)
    paths = RunPaths(tmp_path, "ocean")
    if "/" in name or "\0" in name:
        with pytest.raises(ArtifactError, match="lead out of"):
            paths.adapter(name)
        with pytest.raises(ArtifactError, match="lead out of"):
            paths.merged("bias", name)


def test_a_link_to_a_folder_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    require_inside(tmp_path, Path("link/a.jsonl"), "data.train")
