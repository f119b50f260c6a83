"""What a checkpoint changed is read off its files, and a direction in it is recognised."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from compile_steer.cli.app import app
from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import write_patch
from compile_steer.lowering import exact
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program, ablate_everywhere
from compile_steer.tools.audit import audit
from tests.contract.test_adapters import origin
from tests.helpers.auditing import DOWN, look, merged, on_disk, rewritten
from tests.helpers.tiny import HIDDEN, LAYERS, intervention, random_patch, vector


@pytest.fixture
def base(tmp_path: Path) -> LoadedModel:
    return on_disk("llama", tmp_path / "base")


def test_a_copy_has_no_change_and_a_cast_is_only_that(base: LoadedModel, tmp_path: Path) -> None:
    same = look(base, Path(base.source))
    assert (same.kind, same.changes, same.settings, same.baked) == ("checkpoint", [], [], [])
    assert same.n_same == same.n_tensors > 0
    assert same.not_baked == "no weight was changed"
    cast = look(base, merged(base, WeightPatch(), tmp_path / "cast", torch.bfloat16))
    assert cast.recast == {"float32 to bfloat16": cast.n_tensors}
    assert cast.changes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_direction_is_found_in_its_bias(base: LoadedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    program = Program((intervention(layer=1, coefficient=-1.7),), base.id, base.revision)
    other = merged(base, exact.bias_patch(canonical(program), base.layout), tmp_path / "other", dtype)
    found = look(base, other, program)
    (baked,) = found.baked
    assert (baked.kind, baked.block, baked.tensors) == ("added", 1, [f"{DOWN}.bias"])
    assert baked.norm == pytest.approx(1.7 * 2.5, rel=1e-2)
    assert baked.cosine == pytest.approx(1.0, abs=1e-3)
    assert look(base, other, 2.0 * -program).baked[0].cosine == pytest.approx(-1.0, abs=1e-3)
    assert {change.kind for change in found.changes} == {"added"}
    assert [(one.key, one.base, one.other) for one in found.settings] == [("mlp_bias", "false", "true")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coefficient", [1.0, 0.6])
def test_an_ablated_direction_is_found_in_all_writers(
    base: LoadedModel, tmp_path: Path, dtype: torch.dtype, coefficient: float
) -> None:
    u = vector(3, norm=1.0)
    program = Program(ablate_everywhere(u, LAYERS, coefficient), base.id, base.revision)
    found = look(
        base, merged(base, exact.orthogonalise(canonical(program), base.layout), tmp_path / "other", dtype), program
    )
    (baked,) = found.baked
    assert (baked.kind, baked.block) == ("ablated", None)
    assert len(baked.tensors) == 2 * LAYERS + 1
    assert baked.coefficient == pytest.approx(coefficient, abs=0.02)
    assert baked.cosine == pytest.approx(1.0, abs=1e-2)
    assert {change.rank for change in found.changes} == {1}, "rounding to bf16 is no rank"
    assert {change.dtype for change in found.changes} == {str(dtype).removeprefix("torch.")}
    patch = tmp_path / "patch"
    write_patch(patch, exact.orthogonalise(canonical(program), base.layout), base, origin(base, "patch"), "")
    assert look(base, patch, program).baked[0].coefficient == pytest.approx(coefficient, abs=1e-4)


def test_a_rank_one_writer_is_said_to_write_along_its_direction(base: LoadedModel, tmp_path: Path) -> None:
    program = Program((intervention(layer=1),), base.id, base.revision)
    edit = LowRank(program.interventions[0].vector.view(-1, 1), torch.randn(1, 48))
    write_patch(tmp_path / "a", WeightPatch({DOWN: edit}), base, origin(base), "")
    found = look(base, tmp_path / "a", program)
    (baked,) = found.baked
    assert (found.kind, baked.kind, baked.block) == ("adapter", "written", 1)
    assert baked.cosine == pytest.approx(1.0, abs=1e-5)
    assert found.changes[0].cosine == pytest.approx(1.0, abs=1e-5)
    assert found.changes[0].top == pytest.approx(1.0, abs=1e-5)
    assert baked.norm == pytest.approx(float((edit.B @ edit.A).norm()), rel=1e-4)


def test_ranks_norms_and_shares_are_those_of_the_difference(base: LoadedModel, tmp_path: Path) -> None:
    patch = random_patch(base)
    found = look(base, merged(base, patch, tmp_path / "other"))
    changes = {change.name: change for change in found.changes}
    assert changes.keys() == {f"{name}.weight" for name in patch.low_rank}
    for name, edit in patch.low_rank.items():
        change, delta = changes[f"{name}.weight"], edit.B @ edit.A
        assert change.rank == edit.rank
        assert change.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        held = base.model.get_submodule(name).weight
        assert isinstance(held, Tensor)
        assert change.relative == pytest.approx(float(delta.norm() / held.norm()), rel=1e-4)
        S = torch.linalg.svdvals(delta)
        assert change.top == pytest.approx(float(S[0] ** 2 / S.square().sum()), rel=1e-4)
    assert not found.baked
    assert "write nothing to the stream" in found.not_baked
    coarse = look(base, tmp_path / "other", threshold=0.99)
    assert {change.rank for change in coarse.changes} == {1}


def test_a_tuned_writer_is_no_direction(base: LoadedModel, tmp_path: Path) -> None:
    def tune(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight"] += 0.1 * torch.randn(HIDDEN, 48)
        tensors["model.norm.weight"] *= 1.1

    found = look(base, rewritten(base, tmp_path / "other", tune))
    assert [(one.name, one.rank) for one in found.changes] == [(f"{DOWN}.weight", 32), ("model.norm.weight", None)]
    assert not found.baked

    def tune_one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.weight"] += 0.1 * torch.randn(HIDDEN, 48)

    only = rewritten(base, tmp_path / "only", tune_one)
    assert "another rank than 1" in look(base, only).not_baked


def test_tensors_that_came_went_or_changed_shape_are_told_apart(base: LoadedModel, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.3.input_layernorm.weight"]
        tensors["extra.weight"] = torch.ones(3, 2)
        tensors["model.embed_tokens.weight"] = torch.ones(5, HIDDEN)

    found = look(base, rewritten(base, tmp_path / "other", change))
    kinds = {(one.name, one.kind) for one in found.changes}
    assert kinds == {
        ("model.layers.3.input_layernorm.weight", "removed"),
        ("extra.weight", "added"),
        ("model.embed_tokens.weight", "removed"),
        ("model.embed_tokens.weight", "added"),
    }


def test_another_architecture_and_an_untied_head_are_seen_through(tmp_path: Path) -> None:
    one = on_disk("qwen2", tmp_path / "qwen")
    program = Program((intervention(layer=1),), one.id, one.revision)
    found = look(
        one, merged(one, exact.convert_architecture(canonical(program), one.layout), tmp_path / "llama"), program
    )
    assert {setting.key for setting in found.settings} >= {"model_type", "architectures"}
    (baked,) = found.baked
    assert baked.kind == "added"
    assert baked.cosine == pytest.approx(1.0, abs=1e-4)
    found = look(one, merged(one, replace(WeightPatch(), untie=True), tmp_path / "untied"))
    assert found.changes == [], "the head is a copy of the embeddings"
    assert [one.key for one in found.settings if one.file == "config.json"] == ["tie_word_embeddings"]


def test_names_without_the_models_prefix_are_the_same_tensors(tmp_path: Path) -> None:
    one = on_disk("gpt2", tmp_path / "gpt2")
    bare = tmp_path / "bare"
    shutil.copytree(one.source, bare)
    tensors = load_file(str(bare / "model.safetensors"))
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, str(bare / "model.safetensors")
    )
    assert look(one, bare).changes == []
    patch = random_patch(one)
    name = "transformer.h.1.mlp.c_proj"
    other = merged(one, WeightPatch({name: patch.low_rank[name]}), tmp_path / "other")
    found = audit(str(bare), str(other), None, 0.01, Progress())
    assert [(change.name, change.rank) for change in found.changes] == [(f"{name}.weight", patch.low_rank[name].rank)]


def test_the_command_prints_and_writes_json(base: LoadedModel, tmp_path: Path) -> None:
    program = Program((intervention(layer=1),), base.id, base.revision)
    program.save(tmp_path / "v.safetensors")
    other = merged(base, exact.bias_patch(canonical(program), base.layout), tmp_path / "other")
    arguments = ["audit", base.source, str(other), "--program", str(tmp_path / "v.safetensors")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    for words in ("A baked direction", "added by", "+1.0000", "mlp_bias", "all zero"):
        assert words in result.output
    shown = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(shown.stdout)["baked"][0]["kind"] == "added"
    nothing = CliRunner().invoke(app, ["audit", base.source, base.source])
    assert "No baked direction" in nothing.output
    assert isinstance(CliRunner().invoke(app, ["audit", str(tmp_path / "x" / "y" / "z"), "b"]).exception, RecipeError)
