"""The chain from every artifact back to its data: what holds, and which link somebody broke."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from compile_steer.artifacts.files import digest, save_record, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Origin, Provenance, artifact_sha256
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError
from compile_steer.pipeline.artifacts import compile_program, merge, verify
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.steering.program import Program
from compile_steer.tools.lineage import lineage
from compile_steer.tools.report_links import Link
from tests.helpers.small_run import NAME, SPLITS, SmallRun

ROOT = Path(__file__).resolve().parents[2]


def artifacts(paths: RunPaths) -> dict[str, Path]:
    return {
        "adapter": paths.adapter("closed_form"),
        "patch": paths.adapter("bias"),
        "merged": paths.merged("closed_form", "fp32"),
        "judged": paths.merged("bias", "fp32"),
        "vector": paths.program,
        "directions": paths.directions,
        "validation": paths.validation,
        "parity": paths.adapter("closed_form") / "parity.json",
        "weights": paths.merged("bias", "fp32") / "model.safetensors",
    }


def links_of(path: Path, recipes: Path | None = None) -> list[Link]:
    return list(lineage(path, recipes))


def changed(links: list[Link]) -> set[str]:
    return {link.name for link in links if link.state == "changed"}


@pytest.mark.parametrize("name", list(artifacts(RunPaths(Path(), NAME))))
def test_from_any_artifact_one_walks_to_the_data(run: SmallRun, name: str) -> None:
    links = links_of(artifacts(run.paths)[name])
    unverified = {("parity", "missing")} if name == "merged" else set()
    assert {(link.name, link.state) for link in links if link.state != "intact"} == unverified
    assert {link.name for link in links} >= {"recipe", *(f"data {split}" for split in SPLITS)}
    result = CliRunner().invoke(app, ["show", str(artifacts(run.paths)[name]), "--json"])
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["lineage"]) == len(links)


def test_recipes_versions_and_seeds_are_in_every_artifact(run: SmallRun) -> None:
    recipe, paths = run.read(), run.paths
    origin = Origin.read(paths.program)
    assert origin is not None
    folder = Provenance.read(paths.merged("bias", "fp32"))
    for record in (origin, folder):
        assert record.recipe == recipe.record
        assert record.recipe["seed"] == 5
        assert record.recipe_sha256 == recipe.hash
        assert record.versions.keys() >= {"torch", "transformers", "peft"}
    assert origin.directions_sha256 == sha256(paths.directions)
    assert folder.parent == artifact_sha256(paths.adapter("bias"))
    assert folder.described == Program.load(paths.program).describe()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_recalled_from_its_record(path: Path) -> None:
    recipe = read_recipe(path)
    again = Recipe.recall(json.loads(json.dumps(recipe.record)), path.parent)
    assert again == recipe
    assert again.hash == recipe.hash


SHOW = """
import sys
from compile_steer.__main__ import main
sys.argv = ["compile-steer", "show", sys.argv[1]]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {"torch", "transformers", "peft", "scipy", "huggingface_hub"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.mark.parametrize("name", ["adapter", "judged"])
def test_showing_a_folder_imports_no_heavy_library(run: SmallRun, name: str) -> None:
    subprocess.run([sys.executable, "-c", SHOW, str(artifacts(run.paths)[name])], check=True, cwd=ROOT)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def edit(path: Path) -> None:
    """One number or word of a JSON file, as by hand."""
    content = json.loads(path.read_text(encoding="utf-8"))
    key = next(key for key in ("verdict", "passed", "seed") if key in content)
    path.write_text(json.dumps({**content, key: {"verdict": "pass", "passed": True, "seed": 6}[key]}), encoding="utf-8")


def add_row(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0].replace("w", "w1", 1), *lines[1:]]), encoding="utf-8")


def turn(path: Path) -> None:
    """The same tensors with the other sign: a valid file."""
    tensors, metadata = read_tensors(path)
    save_file({name: -1 * tensor for name, tensor in tensors.items()}, str(path), metadata=metadata)


Spoil = Callable[[Path], None]
TAMPERED: list[tuple[str, str, Spoil, set[str]]] = [
    (
        "adapter",
        "adapters/tide-closed_form/adapter_model.safetensors",
        cut_short,
        {"files", "parity is of these weights"},
    ),
    ("adapter", "adapters/tide-closed_form/adapter_model.safetensors", turn, {"files", "parity is of these weights"}),
    ("adapter", "adapters/tide-closed_form/adapter_config.json", Path.unlink, {"files", "parity is of these weights"}),
    ("adapter", "adapters/tide-closed_form/compile_steer.json", edit, {"record", "validation's verdict"}),
    ("adapter", "adapters/tide-closed_form/parity.json", edit, {"parity's record", "parity's verdict"}),
    ("adapter", "vectors/tide.validation.json", edit, {"validation"}),
    ("merged", "vectors/tide.validation.json", cut_short, {"validation"}),
    ("adapter", "vectors/tide.safetensors", turn, {"vector"}),
    ("merged", "vectors/tide.safetensors", cut_short, {"vector"}),
    ("merged", "adapters/tide-closed_form/adapter_model.safetensors", turn, {"adapter"}),
    ("merged", "adapters/tide-closed_form/compile_steer.json", edit, {"adapter"}),
    ("merged", "merged/tide-closed_form-fp32/model.safetensors", cut_short, {"files"}),
    ("merged", "vectors/tide.directions.safetensors", turn, {"directions"}),
    ("merged", "../../recipes/data/heldout.jsonl", add_row, {"data heldout"}),
    ("vector", "vectors/tide.directions.safetensors", cut_short, {"directions"}),
    ("vector", "vectors/tide.safetensors", turn, {"validation is of this vector"}),
    ("vector", "../../recipes/data/train.jsonl", add_row, {"data train"}),
    ("directions", "../../recipes/data/train.jsonl", add_row, {"data train"}),
    ("validation", "vectors/tide.validation.json", edit, {"record", "validation's verdict by its figures"}),
]


@pytest.mark.parametrize(("asked", "file", "spoil", "links"), TAMPERED)
def test_what_was_tampered_with_is_named(run: SmallRun, asked: str, file: str, spoil: Spoil, links: set[str]) -> None:
    spoil(run.paths.out / file)
    path = artifacts(run.paths)[asked]
    found = links_of(path)
    assert changed(found) == links
    assert all(link.expected != link.actual for link in found if link.state == "changed")
    result = CliRunner().invoke(app, ["show", str(path), "--json"])
    assert result.exit_code == 1
    assert {one["name"] for one in json.loads(result.stdout)["lineage"] if one["state"] == "changed"} == changed(found)
    printed = CliRunner().invoke(app, ["show", str(path)])
    assert printed.exit_code == 1
    assert "expected" in printed.stdout
    assert "Changed:" in printed.stdout


def test_a_swapped_adapter_is_found_by_its_name_and_by_its_child(run: SmallRun) -> None:
    paths = run.paths
    other = paths.adapter("other")
    shutil.move(paths.adapter("closed_form"), other)
    shutil.copytree(paths.adapter("bias"), paths.adapter("closed_form"))
    (link,) = [link for link in links_of(paths.merged("closed_form", "fp32")) if link.state == "changed"]
    assert link.name == "adapter"
    assert link.expected == artifact_sha256(other)
    assert link.actual == artifact_sha256(paths.adapter("bias"))


def test_a_file_that_was_put_there_later_is_named_and_a_hidden_one_is_not(run: SmallRun) -> None:
    folder = run.paths.adapter("closed_form")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs", encoding="utf-8")
    assert not changed(links_of(folder))
    (folder / "model-2.safetensors").write_bytes(b"")
    (link,) = [link for link in links_of(folder) if link.name == "files"]
    assert (link.state, link.expected) == ("changed", "")


def test_an_artifact_by_itself_says_what_is_not_here(run: SmallRun, tmp_path: Path) -> None:
    alone = tmp_path.parent / f"{tmp_path.name}-alone" / "adapters" / "tide-closed_form"
    shutil.copytree(run.paths.adapter("closed_form"), alone)
    links = links_of(alone)
    assert not changed(links)
    assert {link.name for link in links if link.state == "missing"} == {
        "validation", "vector", *(f"data {split}" for split in SPLITS)
    }  # fmt: skip
    links = links_of(alone, run.root / "recipes")
    assert {link.name for link in links if link.state == "missing"} == {"validation", "vector"}
    (run.root / "recipes" / "data" / "neutral.jsonl").unlink()
    links = links_of(alone, run.root / "recipes")
    assert {link.name for link in links if link.state == "missing"} == {"validation", "vector", "data neutral"}


def test_a_recipe_with_keys_of_another_version_is_no_error(run: SmallRun) -> None:
    folder = run.paths.adapter("closed_form")
    provenance = Provenance.read(folder)
    recipe = {**provenance.recipe, "an_older_key": 1}
    record = {**vars(provenance), "recipe": recipe, "recipe_sha256": digest(recipe)}
    save_record(folder / "compile_steer.json", record)
    links = [link for link in links_of(folder) if link.path.endswith("another version of compile_steer")]
    assert [(link.name, link.state) for link in links] == [
        (f"data {name}", "missing") for name in record["data_sha256"]
    ]


@pytest.mark.parametrize("name", ["adapter", "vector", "validation"])
def test_what_cannot_be_read_at_all_is_an_error(run: SmallRun, name: str) -> None:
    path = artifacts(run.paths)[name]
    cut_short(path / "compile_steer.json" if path.is_dir() else path)
    with pytest.raises(ArtifactError):
        links_of(path)
    result = CliRunner().invoke(app, ["show", str(path)])
    assert isinstance(result.exception, ArtifactError)


def test_foreign_and_missing_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was not made by compile_steer"):
        links_of(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        links_of(tmp_path / "nothing")


def test_the_committed_example_is_older_and_still_readable() -> None:
    links = links_of(ROOT / "adapters" / "ocean-closed_form")
    assert not changed(links)
    assert {"vector", "validation", "parity is of these weights"} <= {
        link.name for link in links if link.state == "intact"
    }


def test_merge_and_verify_refuse_what_was_tampered_with_and_compile_makes_it_again(run: SmallRun) -> None:
    opened, folder = run.open(), run.paths.adapter("closed_form")
    before = sha256(folder / "adapter_model.safetensors")
    turn(folder / "adapter_model.safetensors")
    for span in (merge, verify):
        with pytest.raises(CompileSteerError, match="adapter_model.safetensors was changed"):
            span(opened, [folder])
    assert folder in compile_program(opened, force=True)
    assert sha256(folder / "adapter_model.safetensors") == before
    assert not changed(links_of(folder))


def test_an_edited_verdict_is_not_compiled_by_and_is_measured_again(run: SmallRun) -> None:
    opened, path = run.open(), run.paths.validation
    before = sha256(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "verdict": "pass"}), encoding="utf-8")
    with pytest.raises(CannotLower, match="was edited after it was written"):
        compile_program(opened)
    compile_program(opened, force=True)
    assert Provenance.read(run.paths.adapter("bias")).verdict == "none"
    opened.validate()
    assert sha256(path) == before
