"""Arithmetic on patches is arithmetic on weights, and the report says what numpy would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.low_rank import LowRank, weight_delta
from compile_steer.steering.patch import WeightPatch
from compile_steer.tools.task_vector import matrix_reports
from tests.helpers.tiny import intervention, loaded, program, random_patch, vector

DOWN, QUERY, EMBEDDINGS = "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "model.embed_tokens"


def mixed(family: str, seed: int = 0) -> WeightPatch:
    """Low-rank and whole changes, some of the same modules, and biases."""
    one, low = loaded(family), random_patch(loaded(family), seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    names = sorted(low.low_rank)
    dense = {}
    for name in names[::2]:
        weight = one.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        dense[name] = 0.2 * torch.randn(weight.shape, generator=generator)
    low_rank = {name: edit for name, edit in low.low_rank.items() if name != names[0]}
    return WeightPatch(low_rank, {names[1]: vector(seed)}, ("mlp_bias",), dense=dense)


def deltas(family: str, patch: WeightPatch) -> dict[str, Tensor]:
    """Everything that the patch adds, by parameter."""
    model, reports = loaded(family).model, {}
    for name, edit in patch.low_rank.items():
        reports[f"{name}.weight"] = weight_delta(model.get_submodule(name), edit)
    for name, delta in patch.dense.items():
        reports[f"{name}.weight"] = reports.get(f"{name}.weight", torch.zeros(())) + delta
    return reports | {f"{name}.bias": bias for name, bias in patch.bias.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=atol) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_patch_and_its_negative_are_the_base(family: str) -> None:
    patch = mixed(family)
    nothing = deltas(family, patch + -1.0 * patch)
    assert nothing.keys() == deltas(family, patch).keys()
    assert all(float(delta.abs().max()) < 1e-6 for delta in nothing.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factors_and_sums_are_those_of_the_weights(family: str) -> None:
    one, other = mixed(family, 0), mixed(family, 1)
    other = replace(other, dense={name: other.dense[name] for name in sorted(other.dense)[1:]})
    mine, yours = deltas(family, one), deltas(family, other)
    reports = deltas(family, -1.3 * one + other)
    zero = torch.zeros(())
    assert same(reports, {n: -1.3 * mine.get(n, zero) + yours.get(n, zero) for n in mine.keys() | yours.keys()})
    assert (one + other).config_flags == ("mlp_bias",)


def test_what_makes_room_for_a_patch_is_kept_by_a_sum_and_two_families_are_refused() -> None:
    one = WeightPatch(bias={DOWN: vector(0)}, config_flags=("mlp_bias",), architecture="llama")
    other = WeightPatch(config_flags=("attention_bias",), untie=True)
    reports = other + one
    assert (reports.config_flags, reports.untie, reports.architecture) == (
        ("attention_bias", "mlp_bias"),
        True,
        "llama",
    )
    wide = replace(other, architecture="granite", bias={DOWN: vector(0, width=7)})
    with pytest.raises(ArtifactError) as caught:
        _ = one + wide
    assert caught.value.problems[:2] == (
        f"{DOWN} (bias) is [32] in one patch and [7] in the other.",
        "one patch is for the base rewritten as granite, the other as llama.",
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cut_is_the_best_of_its_rank_and_at_full_rank_everything(family: str) -> None:
    patch, layout = mixed(family), loaded(family).layout
    whole = deltas(family, patch)
    everything = patch.truncated(48, layout)
    assert not everything.dense
    assert same(deltas(family, everything), whole, atol=1e-4)
    two = patch.truncated(2, layout)
    assert two.max_rank == 2
    assert (two.bias, two.config_flags) == (patch.bias, patch.config_flags)
    for name, matrix in deltas(family, two).items():
        if name.endswith(".weight"):
            left = torch.linalg.svdvals(whole[name].double())[2:].norm()
            assert float((whole[name] - matrix).norm()) == pytest.approx(float(left), abs=1e-4)


def test_edits_that_are_small_enough_are_left_as_they_are() -> None:
    patch = random_patch(loaded("llama"), ranks=(2, 3))
    reports = patch.truncated(2, loaded("llama").layout)
    for name, edit in patch.low_rank.items():
        assert (reports.low_rank[name] is edit) == (edit.rank == 2)
        assert reports.low_rank[name].rank == 2


def test_the_report_finds_the_direction_that_a_writer_writes_and_a_reader_reads() -> None:
    v, noise = vector(0), vector(7)
    across = noise - (noise @ v) / (v @ v) * v
    B, A = torch.stack([-3 * v, across], dim=1), torch.linalg.qr(torch.randn(48, 2))[0].T
    reader = LowRank(torch.linalg.qr(torch.randn(48, 2))[0], torch.stack([4 * v, across]))
    early = DOWN.replace(".1.", ".0.")
    patch = WeightPatch({DOWN: LowRank(B, A), QUERY: reader, EMBEDDINGS: LowRank(torch.ones(97, 1), v.view(1, -1))})
    patch = replace(patch, dense={early: B @ A, "model.layers.3.mlp.up_proj": torch.zeros(48, 32)})
    layout, steering = loaded("llama").layout, program("llama", intervention(layer=1, seed=0))
    reports = {one.name: one for one in matrix_reports(patch, layout, steering)}
    assert list(reports) == [EMBEDDINGS, early, DOWN, QUERY, "model.layers.3.mlp.up_proj"]
    assert reports[DOWN].cosine == pytest.approx(1.0)
    assert reports[QUERY].cosine == pytest.approx(1.0)
    assert reports[early].cosine is None, "no vector lies at or below block 0"
    assert reports[EMBEDDINGS].cosine is None
    assert reports[DOWN].norm == pytest.approx(float((B @ A).norm()))
    assert reports[DOWN].stable_rank == pytest.approx(1 + float(across @ across / (9 * v @ v)), rel=1e-4)
    assert (reports[DOWN].rank_99, reports[QUERY].rank_99, reports[EMBEDDINGS].rank_99) == (2, 2, 1)
    assert reports[early].stable_rank == pytest.approx(reports[DOWN].stable_rank)
    assert (reports["model.layers.3.mlp.up_proj"].norm, reports["model.layers.3.mlp.up_proj"].rank_99) == (0.0, 0)
    assert all(one.cosine is None for one in matrix_reports(patch, layout, None))
