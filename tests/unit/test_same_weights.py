"""Which models that were loaded from disk have the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from compile_steer.models.load import LoadedModel
from compile_steer.models.reload import ADAPTER, adapter_scaled, fresh_copy, reload
from compile_steer.verification.same_weights import have_same_weights
from tests.helpers.tiny import loaded
from tests.helpers.verification import VerifierCase


def read(case: VerifierCase, folder: Path) -> LoadedModel:
    return reload(folder, case.base)


def test_an_adapter_and_its_merge_have_the_same_and_the_base_others(case: VerifierCase) -> None:
    adapter, merged = read(case, case.adapter("one")), read(case, case.merged_adapter("merge-of-one"))
    assert have_same_weights(adapter, merged) and have_same_weights(merged, adapter)
    assert have_same_weights(adapter, read(case, case.adapter("another")))
    assert not have_same_weights(adapter, case.base) and not have_same_weights(case.base, merged)
    assert not have_same_weights(adapter, read(case, case.merged("steered")))


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_what_a_merge_is_at_another_scale_is_something_else(case: VerifierCase, factor: float) -> None:
    adapter, merged = read(case, case.adapter("scaled")), read(case, case.merged_adapter("merge-of-scaled"))
    with adapter_scaled(adapter, factor):
        assert have_same_weights(adapter, merged) == (factor == 1)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [1e-4, float("nan")])
def test_one_element_is_enough(case: VerifierCase, name: str, value: float) -> None:
    own = fresh_copy(case.base)
    assert have_same_weights(own, case.base)
    parameter: Any = own.model.get_parameter(name)
    parameter.data = parameter.data.clone()
    parameter.data.view(-1)[3] += value
    assert not have_same_weights(own, case.base)


def test_a_buffer_counts_too(case: VerifierCase) -> None:
    own: Any = fresh_copy(case.base)
    own.model.model.rotary_emb.inv_freq = own.model.model.rotary_emb.inv_freq * 1.01
    assert not have_same_weights(own, case.base)


def test_another_class_has_other_weights() -> None:
    assert not have_same_weights(loaded("llama"), loaded("qwen3"))


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_of_an_adapter_that_is_more_than_a_product_nobody_can_tell(case: VerifierCase, more: dict[str, Any]) -> None:
    """Its W + B A is the base's: B is zero."""
    config = LoraConfig(r=2, target_modules=["down_proj"], bias="none", **more)
    own = fresh_copy(case.base)
    wrapped: Any = get_peft_model(own.model, config, adapter_name=ADAPTER).eval()
    assert all(not layer.lora_B[ADAPTER].weight.any() for layer in wrapped.modules() if isinstance(layer, LoraLayer))
    adapted = LoadedModel(wrapped, own.tokenizer, "adapter", "", own.source)
    assert have_same_weights(adapted, case.base) == (not more)
    with torch.no_grad(), wrapped.disable_adapter():
        assert not have_same_weights(adapted, case.base), "it computes without"
