"""A patch on the modules' outputs is the patch in their weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.low_rank import LowRank, weight_delta
from compile_steer.steering.patch import WeightPatch, with_patch
from tests.helpers.captures import n_hooks
from tests.helpers.tiny import FAMILIES, Padded, build, loaded, logits, random_patch, relative_error, texts, vector


def low_rank(rank: int = 3, d_out: int = 5, d_in: int = 7) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    return LowRank(torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator))


def biases(family: str) -> dict[str, torch.Tensor]:
    """Biases for some modules that may or may not have one."""
    return {name: vector(n) for n, name in enumerate(sorted(random_patch(loaded(family)).low_rank)) if "down" in name}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_applied_patch_equals_merged_weights(family: str, side: str) -> None:
    tiny, merged = loaded(family), build(family)
    patch = random_patch(tiny)
    batch = Padded.of(texts(), side)
    base = logits(tiny.model, batch)
    with torch.no_grad():
        for name, edit in patch.low_rank.items():
            module = merged.get_submodule(name)
            delta = weight_delta(module, edit)
            assert isinstance(module.weight, nn.Parameter)
            assert delta.shape == module.weight.shape
            module.weight.add_(delta)
    with with_patch(tiny.model, patch):
        patched = logits(tiny.model, batch)
    assert relative_error(patched, logits(merged, batch)) < 1e-5
    assert relative_error(patched, base) > 1e-2
    assert torch.equal(logits(tiny.model, batch), base)


def test_conv1d_stores_its_weight_the_other_way_round() -> None:
    module = build("gpt2").get_submodule("transformer.h.1.mlp.c_proj")
    edit = low_rank(d_out=32, d_in=48)
    assert torch.equal(weight_delta(module, edit), (edit.B @ edit.A).T)
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    before = module(x)
    assert isinstance(module.weight, nn.Parameter)
    with torch.no_grad():
        module.weight.add_(weight_delta(module, edit))
    assert relative_error(module(x) - before, x @ (edit.B @ edit.A).T) < 1e-4


def test_an_applied_bias_is_added_to_what_the_module_writes() -> None:
    tiny, merged = loaded("llama"), build("llama", mlp_bias=True)
    weights = tiny.model.state_dict()
    missing = merged.load_state_dict(weights, strict=False).missing_keys
    assert missing
    assert all(name.endswith("bias") for name in missing)
    patch = WeightPatch(bias=biases("llama"))
    assert len(patch.bias) == 2
    with torch.no_grad():
        for name in missing:
            merged.get_parameter(name).zero_()
        for name, bias in patch.bias.items():
            merged.get_parameter(f"{name}.bias").copy_(bias)
    batch = Padded.of(texts(), "left")
    with with_patch(tiny.model, patch):
        patched = logits(tiny.model, batch)
    assert relative_error(patched, logits(merged, batch)) < 1e-5
    assert relative_error(patched, logits(tiny.model, batch)) > 1e-2


def test_an_applied_patch_leaves_no_hook_even_after_an_error() -> None:
    tiny = loaded("gpt2")
    before = n_hooks(tiny.model)
    patch = random_patch(tiny)
    with (
        pytest.raises(ZeroDivisionError),
        with_patch(tiny.model, replace(patch, bias={sorted(patch.low_rank)[0]: vector(0)})),
    ):
        assert n_hooks(tiny.model) == before + len(patch.low_rank) + 1
        raise ZeroDivisionError
    assert n_hooks(tiny.model) == before


def test_padding_an_edit_to_a_rank_does_not_change_it() -> None:
    edit = low_rank(3)
    wide = edit.padded(8)
    assert (wide.rank, tuple(wide.B.shape), tuple(wide.A.shape)) == (8, (5, 8), (8, 7))
    assert torch.equal(wide.B[:, :3], edit.B)
    assert torch.equal(wide.A[:3], edit.A)
    assert not wide.B[:, 3:].any()
    assert not wide.A[3:].any()
    assert edit.padded(3) is edit


def test_the_largest_rank_of_a_patch_counts() -> None:
    assert WeightPatch({"a": low_rank(2), "b": low_rank(4)}).max_rank == 4
    assert WeightPatch(bias={"a": vector(0)}).max_rank == 0


def test_every_module_that_is_not_finite_is_named() -> None:
    good, bad = low_rank(2), low_rank(2)
    bad.A[1, 2] = math.nan
    infinite = low_rank(3)
    infinite.B[0, 0] = -math.inf
    bias = vector(1)
    bias[4] = math.inf
    patch = WeightPatch({"good": good, "a.nan": bad, "b.inf": infinite}, {"c.bias": bias, "fine": vector(2)})
    with pytest.raises(ArtifactError, match=r"a\.nan, b\.inf, c\.bias are not finite"):
        patch.require_finite()
    WeightPatch({"good": good}, {"fine": vector(2)}).require_finite()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sum_of_scaled_patches_makes_the_sum_of_their_changes(family: str) -> None:
    tiny = loaded(family)
    first, second = (
        replace(random_patch(tiny, ranks=ranks, seed=seed), bias=biases(family))
        for seed, ranks in enumerate(((2, 3), (1,)))
    )
    second = replace(second, low_rank=dict(list(second.low_rank.items())[1:]), config_flags=("mlp_bias",), untie=True)
    total = 0.4 * first + second * -1.7
    assert set(total.low_rank) == set(first.low_rank)
    for name, edit in total.low_rank.items():
        expected = 0.4 * (first.low_rank[name].B @ first.low_rank[name].A)
        if name in second.low_rank:
            expected -= 1.7 * (second.low_rank[name].B @ second.low_rank[name].A)
            assert edit.rank == first.low_rank[name].rank + 1
        assert torch.allclose(edit.B @ edit.A, expected, atol=1e-5)
    assert all(torch.allclose(total.bias[name], (0.4 - 1.7) * shift) for name, shift in first.bias.items())
    assert (total.config_flags, total.untie) == (("mlp_bias",), True)
    assert (first.config_flags, first.untie) == ((), False)
