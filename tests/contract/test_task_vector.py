"""From patches on disk to a new one, as the command line does it; and the walk that leaves them there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_steer.__main__ import main
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.lowering.training import train
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import reload
from compile_steer.pipeline.artifacts import artifacts, compile_program, merge
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.steering.low_rank import LowRank, weight_delta
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from compile_steer.tools.lineage import lineage
from tests.contract.test_adapters import origin
from tests.helpers.small_run import NAME, SmallRun, prepare
from tests.helpers.tiny import Padded, intervention, loaded, logits, random_patch, relative_error, texts

DOWN = "model.layers.1.mlp.down_proj"
SETTINGS = [
    "compile.backends=[full, full_cut]",
    "compile.calibration.prompts=10",
    "compile.calibration.max_new_tokens=6",
    "compile.distill.prompts=5",
    "compile.full.optimizer=adamw",
    "compile.full.learning_rate=0.02",
    "compile.full.batch_tokens=64",
    "compile.full.modules=[mlp.down_proj]",
    "compile.full.cut_rank=3",
    "verify.forms=[adapter, merged-fp32]",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model in a folder that the recipe of a small run beside it names."""
    folder = Path(prepare(tmp_path_factory.mktemp("base")).read().model)
    loaded("llama").model.save_pretrained(folder)
    return load(str(folder), device="cpu")


def recipe_file(base: LoadedModel) -> Path:
    return SmallRun(Path(base.id).parent).recipe


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "out", NAME)


def recipe(base: LoadedModel, *changes: str) -> Recipe:
    return read_recipe(recipe_file(base), [*SETTINGS, *changes])


def dense(seed: int) -> WeightPatch:
    return WeightPatch(dense={DOWN: torch.randn(32, 48, generator=torch.Generator().manual_seed(seed))})


def write(paths: RunPaths, name: str, patch: WeightPatch, base: LoadedModel) -> Path:
    folder = paths.adapter(name)
    write_patch(folder, patch, base, origin(base), "add +1.7 at resid_post 1")
    return folder


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, base: LoadedModel, paths: RunPaths
) -> Callable[..., tuple[int, str, str]]:
    """Run `compile-steer task-vector`: exit code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        line = ["compile-steer", "task-vector", recipe_file(base)]
        monkeypatch.setattr(sys, "argv", [*map(str, [*line, "--out", paths.out, *arguments])])
        with pytest.raises(SystemExit) as stopped:
            main()
        output = capsys.readouterr()
        return int(stopped.value.code or 0), output.out, output.err

    return run


def test_scaled_and_added_and_cut_on_disk(
    call: Callable[..., tuple[int, str, str]], base: LoadedModel, paths: RunPaths
) -> None:
    one, two = write(paths, "one", dense(1), base), write(paths, "two", dense(2), base)
    three = write(paths, "three", random_patch(base), base)
    Program((intervention(),), base.id, base.revision).save(paths.program, {})
    code, output, _ = call("--artifact", one, "--scale", "-1", "--add", two, "--add", three, "--to", "mix", "--json")
    assert code == 0
    found = json.loads(output)
    assert (found["folder"], found["form"]) == (str(paths.adapter("mix")), "patch")
    reports = {matrix["name"]: matrix for matrix in found["matrices"]}
    assert len(reports) == 14
    assert all(matrix["cosine"] is not None for matrix in reports.values())
    patch = read_patch(paths.adapter("mix"))
    whole = dense(2).dense[DOWN] - dense(1).dense[DOWN]
    assert torch.allclose(patch.dense[DOWN], whole)
    assert torch.equal(patch.low_rank[DOWN].A, read_patch(three).low_rank[DOWN].A)
    left = Provenance.read(paths.adapter("mix"))
    assert left.recombined == "-1 x tide-one + tide-two + tide-three"
    assert left.parent.split() == [artifact_sha256(folder) for folder in (one, two, three)]
    assert (left.backend, left.verdict, left.validation_sha256, left.forced) == ("mix", "none", "", True)
    parts = [link for link in lineage(paths.adapter("mix")) if link.name == "part"]
    assert [(link.state, link.path) for link in parts] == [("intact", str(folder)) for folder in (one, two, three)]
    (merged,) = merge(Run.open(recipe(base), paths.out, Progress()), [paths.adapter("mix")])
    for folder in (paths.adapter("mix"), merged):
        card = (folder / "README.md").read_text("utf-8")
        assert left.recombined in card
        assert "Arithmetic on compiled task vectors" in card
        assert "behaves as" not in card
    batch = Padded.of(texts(), "left")
    with with_patch(base.model, patch):
        expected = logits(base.model, batch)
    assert relative_error(logits(reload(merged, base).model, batch), expected) < 1e-5

    code, output, _ = call("--artifact", paths.adapter("mix"), "--cut", "5")
    assert code == 0
    assert "Written as adapter" in output
    small = read_patch(paths.adapter("task_vector")).low_rank[DOWN]
    everything = whole + weight_delta(base.model.get_submodule(DOWN), patch.low_rank[DOWN])
    expected = torch.linalg.svdvals(everything)[5:].norm()
    assert float((everything - small.B @ small.A).norm()) == pytest.approx(float(expected), rel=1e-3)


def test_every_problem_is_named_at_once(
    call: Callable[..., tuple[int, str, str]], base: LoadedModel, paths: RunPaths
) -> None:
    one = write(paths, "one", dense(1), base)
    other = paths.adapter("other")
    write_patch(other, dense(2), base, replace(origin(base), model="some/model", revision="r7"), "add")
    code, _, output = call("--artifact", one, "--add", other, "--add", "nowhere", "--scale", "0", "--to", "one")
    assert code == 2
    assert f"other was compiled for some/model at r7; the base here is {base.id} at {base.revision}" in output
    for words in (
        "nowhere does not exist",
        "the scale is 0",
        "one is read from and would be replaced",
    ):
        assert words in output
    assert read_patch(one).dense
    Program((intervention(),), base.id, base.revision).save(paths.program, {})
    with pytest.raises(ArtifactError, match="other was compiled for some/model at r7"):
        merge(Run.open(recipe(base), paths.out, Progress()), [other])
    code, _, output = call("--artifact", one, "--to", "full")
    assert code == 2
    assert "'full' cannot be the new name" in output


def test_two_rewritten_families_cannot_be_added(
    call: Callable[..., tuple[int, str, str]], base: LoadedModel, paths: RunPaths
) -> None:
    patches = [WeightPatch(bias={DOWN: torch.ones(32)}, architecture=name) for name in ("llama", "granite")]
    one, two = (write(paths, patch.architecture, patch, base) for patch in patches)
    code, _, output = call("--artifact", one, "--add", two)
    assert code == 2
    assert "one patch is for the base rewritten as granite, the other as llama" in output


def test_the_walk_trains_once_for_both_backends_and_again_never(
    base: LoadedModel, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[Any, ...]] = []

    def counted(*given: Any) -> tuple[float, float]:
        trained.append(given)
        return train(*given)

    monkeypatch.setattr("compile_steer.lowering.full.train", counted)
    run = Run.open(recipe(base), paths.out, Progress())
    Program((intervention(),), base.id, base.revision).save(paths.program, {})
    whole, small = compile_program(run, force=True)
    assert len(trained) == 1
    assert list(read_patch(whole).dense) == list(read_patch(small).low_rank)
    small.joinpath("compile_steer.json").unlink()
    assert compile_program(run, force=True) == [whole, small]
    assert len(trained) == 1, "the whole was kept, the cut made from it"

    assert [folder.name for folder in artifacts(run)] == [
        "tide-full-fp32", "tide-full_cut", "tide-full_cut-fp32",
    ]  # fmt: skip
    merge(run)
    batch = Padded.of(texts(), "right")
    adapted, merged = (reload(folder, base) for folder in artifacts(run)[1:])
    assert relative_error(logits(merged.model, batch), logits(adapted.model, batch)) < 1e-5
    edit: LowRank = read_patch(small).low_rank[DOWN]
    best = torch.linalg.svdvals(read_patch(whole).dense[DOWN])[3:].norm()
    left = read_patch(whole).dense[DOWN] - edit.B @ edit.A
    assert float(left.norm()) == pytest.approx(float(best), rel=1e-3)
