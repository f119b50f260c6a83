"""Blocks below the program are run once for all models that share them, and for no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from compile_steer.models import forward, shared_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import final_states
from compile_steer.models.reload import shallow_copy
from compile_steer.models.shared_blocks import SharedBlocks
from tests.helpers.sharing import sharing_texts
from tests.helpers.tiny import LAYER, build, intervention, loaded, program

TEXTS = sharing_texts()


@pytest.fixture
def base() -> LoadedModel:
    one = replace(loaded("llama"), model=build("llama", seed=4))
    return replace(one, below=SharedBlocks(one, LAYER))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first block of every pass that follows."""
    starts, run_blocks = list[int](), forward.run_blocks

    def counted(*args: Any, start: int = 0, **options: Any) -> torch.Tensor:
        starts.append(start)
        return run_blocks(*args, start=start, **options)

    monkeypatch.setattr(shared_blocks, "run_blocks", counted)
    return starts


def sibling(base: LoadedModel, change: Callable[[LoadedModel], None]) -> LoadedModel:
    """A model that has the base's memory but for what `change` gives it."""
    other = shallow_copy(base)
    other.model.config = copy.deepcopy(other.model.config)
    change(other)
    return other


def change_weight(name: str) -> Callable[[LoadedModel], None]:
    def change(other: LoadedModel) -> None:
        parameter = other.model.get_parameter(name)
        parameter.data = 1.3 * parameter.data

    return change


def same(base: LoadedModel, other: LoadedModel) -> bool:
    """Whether what is shared gives what a pass through all blocks gives."""
    whole = final_states(replace(other, below=None), TEXTS).response
    return torch.allclose(final_states(other, TEXTS).response, whole, atol=1e-5)


def test_base_steered_and_a_compiled_model_start_above_the_blocks_that_they_share(
    base: LoadedModel, runs: list[int]
) -> None:
    steering = program("llama", intervention(layer=LAYER))
    for under in (None, steering, steering.scaled(-1.0)):
        whole = final_states(replace(base, below=None), TEXTS, under).response
        assert torch.allclose(final_states(base, TEXTS, under).response, whole, atol=1e-5)
    assert same(base, sibling(base, change_weight(f"model.layers.{LAYER}.mlp.down_proj.weight")))
    passes = runs.count(LAYER)
    assert passes == 4 * runs.count(0) // 5, "each batch runs below once, then four times above, and four times whole"


def test_a_program_below_runs_every_block(base: LoadedModel, runs: list[int]) -> None:
    final_states(base, TEXTS, program("llama", intervention(layer=LAYER - 1)))
    assert set(runs) == {0}


@pytest.mark.parametrize("what", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", "rope", "buffer"])
def test_a_model_that_computes_something_else_below_runs_every_block(base: LoadedModel, what: str) -> None:
    def change(other: LoadedModel) -> None:
        if what == "rope":
            other.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 3.0}
        elif what == "buffer":
            other.layout.backbone.get_buffer("rotary_emb.inv_freq").mul_(2.0)
        else:
            change_weight(what)(other)

    final_states(base, TEXTS)
    other = sibling(base, change)
    assert other.below is base.below and base.below is not None
    assert base.below.serve(base.model) and not base.below.serve(other.model) and same(base, other)


def test_weights_that_are_put_in_the_place_of_the_base_s_own_are_seen(base: LoadedModel) -> None:
    final_states(base, TEXTS)
    change_weight("model.layers.1.self_attn.o_proj.weight")(base)
    assert base.below is not None and not base.below.serve(base.model) and same(base, base)


@pytest.mark.parametrize("whose", ["base", "other"])
def test_a_hook_that_was_left_on_below_is_no_part_of_what_is_shared(base: LoadedModel, whose: str) -> None:
    """Shared, it would act on both sides of a comparison, and so not be seen."""
    other = sibling(base, change_weight(f"model.layers.{LAYER}.mlp.down_proj.weight"))
    plain = final_states(replace(other, below=None), TEXTS).response
    hooked = (base if whose == "base" else other).layout.blocks[0]
    hooked.register_forward_hook(lambda _module, _args, output: output + 1.0)
    found = final_states(other, TEXTS).response
    assert torch.allclose(found, plain, atol=1e-5) == (whose == "base") and same(base, other)


def test_nor_is_one_on_the_input_of_the_first_block_above(base: LoadedModel) -> None:
    other = sibling(base, change_weight(f"model.layers.{LAYER}.mlp.down_proj.weight"))
    plain = final_states(replace(other, below=None), TEXTS).response
    base.layout.blocks[LAYER].register_forward_pre_hook(lambda _module, args: (args[0] + 1.0, *args[1:]))
    assert torch.allclose(final_states(other, TEXTS).response, plain, atol=1e-5)
