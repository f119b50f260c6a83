"""An artifact is made again from the recipe that it carries, and what came out is compared with it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from compile_steer.artifacts.files import digest, save_json, save_record
from compile_steer.artifacts.provenance import Provenance
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CompileSteerError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.pipeline.artifacts import compile_program
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.tools.compare import (
    checkpoint_difference,
    directions_difference,
    patch_difference,
    program_difference,
    report_difference,
)
from compile_steer.tools.lineage import lineage
from compile_steer.tools.reproduce import Reproduction, reproduce
from tests.helpers.generation import generating_model, generating_recipe
from tests.helpers.small_run import NAME, SmallRun
from tests.helpers.tiny import loaded, random_patch

TOLERANCE = 1e-3


def again(path: Path, tmp_path: Path, recipes: Path | None = None) -> Reproduction:
    return reproduce(path, tmp_path / "again", recipes, TOLERANCE, Progress())


def states(reproduction: Reproduction) -> dict[str, str]:
    return {link.name: link.state for link in reproduction.links}


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("adapters/tide-closed_form", ["directions", "validation", "vector", "adapter"]),
        ("adapters/tide-bias", ["directions", "validation", "vector", "patch"]),
        ("merged/tide-closed_form-fp32", ["directions", "validation", "vector", "adapter", "merged-fp32"]),
        ("merged/tide-bias-fp32", ["directions", "validation", "vector", "patch", "merged-fp32"]),
        ("vectors/tide.safetensors", ["directions", "vector"]),
        ("vectors/tide.directions.safetensors", ["directions"]),
    ],
)
def test_the_same_recipe_gives_the_same_bytes(run: SmallRun, tmp_path: Path, name: str, links: list[str]) -> None:
    reproduction = again(run.paths.out / name, tmp_path)
    assert [link.name for link in reproduction.links if link.name.split()[0] not in ("recipe", "data", "base")] == links
    assert set(states(reproduction).values()) == {"bytes"}
    assert reproduction.agrees
    assert not reproduction.versions
    made = sorted(path.name for path in (tmp_path / "again").glob("adapters/*"))
    assert "tide-closed_form" not in made or "closed_form" in name, "a backend after the wanted one is not run"


def rewritten(run: SmallRun, factor: float) -> Path:
    """The adapter with its weights times `factor`, as if another machine had computed and recorded them."""
    folder = run.paths.adapter("closed_form")
    origin = Provenance.read(folder)
    write_patch(folder, factor * read_patch(folder), run.open().model, origin, "")
    return folder


def test_other_bytes_are_told_by_their_numbers(run: SmallRun, tmp_path: Path) -> None:
    near = again(rewritten(run, 1 + 1e-5), tmp_path)
    assert states(near)["adapter"] == "numbers"
    assert near.links[-1].difference == pytest.approx(1e-5, rel=0.05)
    assert "adapter_model.safetensors" in near.links[-1].note
    assert near.agrees
    shutil.rmtree(tmp_path / "again")
    far = again(rewritten(run, 1.1), tmp_path)
    assert states(far)["adapter"] == "differs"
    assert far.links[-1].difference == pytest.approx(0.1 / 1.1, rel=0.01)
    assert not far.agrees
    result = CliRunner().invoke(app, ["reproduce", str(run.paths.adapter("closed_form")), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["links"][-1]["state"] == "differs"
    allowed = CliRunner().invoke(app, ["reproduce", str(run.paths.adapter("closed_form")), "--tolerance", "0.2"])
    assert allowed.exit_code == 0
    assert "numbers agree" in allowed.output


def test_tampered_weights_are_not_what_the_recipe_gives(run: SmallRun, tmp_path: Path) -> None:
    folder = run.paths.adapter("closed_form")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    reproduction = again(folder, tmp_path)
    assert states(reproduction)["adapter"] == "differs"
    assert "not what was written" in reproduction.links[-1].note
    assert "what was written came out again" in reproduction.links[-1].note


@pytest.mark.parametrize("what", ["data train", "record", "recipe", "base"])
def test_nothing_runs_on_other_inputs(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = run.paths.adapter("bias")
    if what == "data train":
        path = run.root / "recipes" / "data" / "train.jsonl"
        path.write_text(path.read_text(encoding="utf-8").replace("w9", "w8"), encoding="utf-8")
    elif what == "base":
        monkeypatch.setattr("compile_steer.tools.reproduce.revision_of", lambda _model: "sha256:other")
    else:
        run.paths.program.unlink()  # else the vector's own record is read first
        origin = Provenance.read(folder)
        path = folder / "compile_steer.json"
        (save_json if what == "record" else save_record)(
            path, {**vars(origin), "recipe": {**origin.recipe, "seed": 77}}
        )
    monkeypatch.setattr("compile_steer.tools.reproduce.Run", None)
    reproduction = again(folder, tmp_path)
    assert {link.name for link in reproduction.links if link.state == "differs"} == {what}
    assert "recorded" in next(link.note for link in reproduction.links if link.name == what)
    assert not reproduction.agrees
    assert not (tmp_path / "again").exists()


def test_other_versions_are_named(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run.paths.directions
    torch_now = torch.__version__
    monkeypatch.setattr("compile_steer.tools.reproduce.versions", lambda: {"torch": "9.9", "transformers": "8.8"})
    reproduction = again(path, tmp_path)
    assert reproduction.versions["torch"] == (torch_now, "9.9")
    assert reproduction.versions["peft"][1] == ""
    assert reproduction.summary()["versions"]["transformers"][1] == "8.8"


def test_an_adapter_by_itself_is_made_again_from_its_own_recipe(run: SmallRun, tmp_path: Path) -> None:
    alone = tmp_path.parent / f"{tmp_path.name}-alone" / "adapters" / "tide-bias"
    shutil.copytree(run.paths.adapter("bias"), alone)
    with pytest.raises(ArtifactError, match="--recipes"):
        again(alone, tmp_path)
    reproduction = again(alone, tmp_path, run.root / "recipes")
    assert (
        states(reproduction)["patch"] == states(reproduction)["vector"] == states(reproduction)["validation"] == "bytes"
    )
    assert states(reproduction)["directions"] == "not compared", "nobody kept their hash there"
    assert reproduction.agrees


def test_a_vector_written_by_hand_is_taken_as_it_is(run: SmallRun, tmp_path: Path) -> None:
    paths = run.paths
    paths.validation.unlink()
    (2.0 * Program.load(paths.program)).save(paths.program)
    compile_program(run.open(), force=True)
    reproduction = again(paths.adapter("bias"), tmp_path)
    (vector,) = [link for link in reproduction.links if link.name == "vector"]
    assert (vector.state, vector.note) == ("bytes", "no recipe made it: taken as it is")
    assert states(reproduction)["patch"] == "bytes"
    assert reproduction.agrees


def test_what_cannot_be_replayed_is_refused_in_words(run: SmallRun, tmp_path: Path) -> None:
    folder = run.paths.adapter("bias")
    origin = Provenance.read(folder)
    (run.root / "recipes" / "data" / "test.jsonl").unlink()
    with pytest.raises(CompileSteerError, match="test.jsonl does not exist"):
        again(folder, tmp_path)
    save_record(folder / "compile_steer.json", {**vars(origin), "recombined": "-1 x tide-bias"})
    with pytest.raises(ArtifactError, match="arithmetic on other artifacts"):
        again(folder, tmp_path)
    save_record(folder / "compile_steer.json", {**vars(origin), "recipe": {}, "recipe_sha256": digest({})})
    with pytest.raises(ArtifactError, match="recorded no recipe"):
        again(folder, tmp_path)
    with pytest.raises(ArtifactError, match="is a report; name what it is about"):
        again(run.paths.validation, tmp_path)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "something").touch()
    with pytest.raises(ArtifactError, match="not an empty folder"):
        again(run.paths.program, tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        reproduce(tmp_path / "nothing", tmp_path / "new", None, TOLERANCE, Progress())
    with pytest.raises(ArtifactError, match="was not made by compile_steer"):
        reproduce(tmp_path / "again", tmp_path / "new", None, TOLERANCE, Progress())


def test_a_base_that_is_gone_is_refused(run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_reference: str) -> str:
        raise RecipeError("model 'x': no such folder")

    monkeypatch.setattr("compile_steer.tools.reproduce.revision_of", gone)
    with pytest.raises(RecipeError, match="no such folder"):
        again(run.paths.program, tmp_path)


def test_generated_pairs_are_generated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = generating_model()
    for part in (one.model, one.tokenizer):
        part.save_pretrained(tmp_path / "model")
    folder, out = tmp_path / "recipes", tmp_path / "runs" / "said"
    folder.mkdir()
    recipe = generating_recipe(folder).model_copy(update={"model": str(tmp_path / "model"), "device": "cpu"})
    opened = Run.open(recipe, out, Progress())
    opened.extract()
    path = opened.paths.directions
    assert {link.state for link in lineage(path)} == {"intact"}
    reproduction = again(path, tmp_path)
    assert set(states(reproduction).values()) == {"bytes"}
    assert states(reproduction).keys() >= {"data train", "data train, prompts", "data neutral"}
    pairs = opened.paths.pairs("test")
    pairs.write_text(pairs.read_text(encoding="utf-8").replace("w", "w1", 1), encoding="utf-8")
    assert [link.name for link in lineage(path) if link.state == "changed"] == ["data test"]
    assert again(path, tmp_path.parent / f"{tmp_path.name}-2").agrees, "they are written again, not read"


# ----------------------------------------------------------------------------------------- agreement


def test_factors_that_differ_are_one_patch_if_their_products_agree(tmp_path: Path) -> None:
    from compile_steer.steering.low_rank import LowRank
    from compile_steer.steering.patch import WeightPatch
    from tests.contract.test_adapters import write

    one = loaded("llama")
    patch = random_patch(one)
    turned = WeightPatch({n: LowRank(-1.7 * e.B, e.A / -1.7) for n, e in patch.low_rank.items()})
    folders = [write(tmp_path / name, which, one) for name, which in (("a", patch), ("b", turned), ("c", 1.3 * patch))]
    assert patch_difference(folders[0], folders[1]) < 1e-6
    assert patch_difference(folders[0], folders[2]) == pytest.approx(0.3, rel=1e-4)
    fewer = WeightPatch(dict(list(patch.low_rank.items())[:2]))
    assert patch_difference(folders[0], write(tmp_path / "d", fewer, one)) == math.inf


def test_a_checkpoint_is_compared_by_what_it_changed(tmp_path: Path) -> None:
    base, change = torch.randn(7, 5), torch.randn(7, 5)
    kept = torch.randn(3)
    tensors = {
        "base": {"w": base, "kept": kept},
        "old": {"w": base + 1e-3 * change, "kept": kept, "b": torch.ones(7)},
        "new": {"w": base + 2e-3 * change, "kept": kept, "b": torch.ones(7)},
        "moved": {"w": base + 1e-3 * change, "kept": kept + 1e-6, "b": torch.ones(7)},
    }
    for name, content in tensors.items():
        (tmp_path / name).mkdir()
        save_file(content, str(tmp_path / name / "model.safetensors"))
    old, base_folder = tmp_path / "old", tmp_path / "base"
    assert checkpoint_difference(old, old, base_folder) == 0.0
    assert checkpoint_difference(old, tmp_path / "new", base_folder) == pytest.approx(1.0, rel=1e-3)
    assert checkpoint_difference(old, tmp_path / "moved", base_folder) == math.inf, "it was left alone"
    assert checkpoint_difference(old, base_folder, base_folder) == math.inf


def test_programs_and_reports_are_compared_by_what_they_do(run: SmallRun, tmp_path: Path) -> None:
    program = Program.load(run.paths.program)
    (1.5 * program).save(tmp_path / "more.safetensors")
    assert program_difference(run.paths.program, tmp_path / "more.safetensors") == pytest.approx(0.5)
    (program + program).save(tmp_path / "twice.safetensors")
    assert program_difference(run.paths.program, tmp_path / "twice.safetensors") == math.inf
    content = json.loads(run.paths.validation.read_text(encoding="utf-8"))
    size = max(abs(content["margin"]["value"]), content["margin"]["high"] - content["margin"]["low"])
    content["margin"]["value"] += 0.25 * size
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    assert report_difference(run.paths.validation, tmp_path / "other.json") == pytest.approx(0.25)
    (tmp_path / "verdict.json").write_text(json.dumps({**content, "verdict": "pass"}), encoding="utf-8")
    assert report_difference(run.paths.validation, tmp_path / "verdict.json") == math.inf
    directions = Directions.load(run.paths.directions)
    replace(directions, vectors=directions.vectors * 1.25).save(tmp_path / f"{NAME}.safetensors")
    assert directions_difference(run.paths.directions, tmp_path / f"{NAME}.safetensors") == pytest.approx(0.25)
