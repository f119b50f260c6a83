"""What a form's rounding costs, told apart from the compile; and what half precision cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compile_steer.errors import ArtifactError
from compile_steer.export import write_merged
from compile_steer.observe import final_states
from compile_steer.patch import LowRank, WeightPatch
from compile_steer.reload import reload
from compile_steer.verify.overflow import HALF, first_beyond
from tests.judged import Scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene.of(tmp_path_factory.mktemp("scene"))


def halves(scene: Scene, name: str, patch: WeightPatch) -> Path:
    folder = scene.folder / name
    write_merged(folder, patch, scene.base, "fp16", scene.origin("merged-fp16", "bias"), "")
    return folder


def test_half_precision_is_measured_as_bf16_is(scene: Scene) -> None:
    (one,) = scene.program.interventions
    patch = WeightPatch(bias={scene.module: one.coefficient * one.vector}, switches=("mlp_bias",))
    parity = scene.judged(halves(scene, "fp16", patch))
    assert parity.passed and parity.form == "merged-fp16"
    assert 0 < parity.noise_kl < scene.reference.precision_noise(torch.bfloat16).mean
    assert 0 < parity.kl_per_token < 10 * parity.noise_kl + 1e-6


def test_what_overflows_in_half_precision_alone_is_refused_by_its_module(scene: Scene) -> None:
    """Every weight fits, and fp32 computes it: only who computes in fp16 would find infinity."""
    up = "model.layers.1.mlp.up_proj"
    weight = scene.base.model.get_submodule(up).weight
    large = LowRank(torch.eye(len(weight)), (60_000.0 - 1) * weight)  # the up projection 60,000 times as large
    folder = halves(scene, "large", WeightPatch({up: large}))
    artifact, texts = reload(folder, scene.base), scene.reference.heldout
    assert bool(torch.isfinite(final_states(artifact, texts).response).all())
    assert first_beyond(artifact, texts, 1e9) is None and first_beyond(scene.base, texts, HALF) is None
    with pytest.raises(ArtifactError, match=rf"the output of {up} reaches .* beyond 65504, the largest of fp16"):
        scene.judged(folder)
