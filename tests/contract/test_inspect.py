"""`compile-steer inspect`: what is measured on a model on disk, and what compiles exactly there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compile_steer.cli.app import app
from compile_steer.lowering.plan import BACKENDS
from compile_steer.tools.inspect_model import FITTED, inspect_layout, ranges
from tests.helpers.tiny import LAYERS, loaded, saved


def inspected(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    app(["inspect", str(folder), *options], standalone_mode=False)
    return capsys.readouterr().out


def test_the_table_of_a_model_on_disk_names_points_backends_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("gpt_oss", tmp_path)
    table = inspected(tmp_path, capsys)
    assert f"GptOssForCausalLM: {LAYERS} blocks model.layers, width 32" in table
    for word in ("self_attn.o_proj", "itself", "now", "orthogonalise", "fit"):
        assert word in table
    assert "Ablation at the embeddings and all projections: by fit: ablate at" in table
    assert "closed_form, distill" in table


def test_json_has_every_point_of_every_kind_of_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("granite", tmp_path)
    found = json.loads(inspected(tmp_path, capsys, "--json"))
    (kind,) = found["kinds"]
    assert (found["d_model"], found["n_layers"], kind["layers"]) == (32, LAYERS, list(range(LAYERS)))
    points = {row["point"]: row for row in kind["points"]}
    assert list(points) == ["attn_out", "mlp_out", "resid_post"]
    assert points["mlp_out"]["multiplier"] == 0.37
    assert points["mlp_out"]["exact"]["add"]["backend"] == "bias"


def test_a_norm_behind_a_projection_and_the_reason_against_a_bias_are_told() -> None:
    inspection = inspect_layout(loaded("gemma2").layout)
    attn, mlp, block = inspection.kinds[0].points
    assert (attn.projection, attn.norm) == ("self_attn.o_proj", "post_attention_layernorm")
    for row in (attn, mlp, block):
        assert row.exact is not None
        assert row.exact["add"].backend is None
        assert "normalises" in row.exact["add"].refusals["bias"]
    assert inspection.everywhere.backend is None


def test_what_is_called_exact_is_what_the_plan_would_take() -> None:
    inspection = inspect_layout(loaded("llama").layout)
    assert inspection.everywhere.backend == "orthogonalise"
    assert not {"bias", "orthogonalise", "retarget"} & set(FITTED)
    assert {"bias", "orthogonalise", "retarget", *FITTED} == set(BACKENDS)


def test_numbers_of_blocks_are_written_as_ranges() -> None:
    assert ranges((0, 1, 2, 4, 6, 7)) == "0-2, 4, 6-7"
