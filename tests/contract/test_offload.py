"""A model most of whose weights stay on disk, by accelerate: the same direction and the same closed form, to 1e-6."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.lowering import distill, full
from compile_steer.lowering.closed_form import Stage
from compile_steer.models.forward import read_activations
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.logprobs import final_states
from compile_steer.models.text import Text
from tests.helpers.fitting import canonical_program, job, random_texts, solve
from tests.helpers.tiny import intervention, saved

TEXTS = random_texts(12, 1)


@pytest.fixture
def both(tmp_path: Path) -> tuple[LoadedModel, LoadedModel]:
    """A model in memory, and with room for half of its weights."""
    whole = saved("llama", tmp_path)
    size = 4 * sum(parameter.numel() for parameter in whole.model.parameters())
    found = load(whole.source, device_map={"cpu": f"{size // 2000}KB"})
    return whole, replace(found, id=whole.id, revision=whole.revision)


def test_a_model_on_disk_gives_the_same_direction_and_closed_form(both: tuple[LoadedModel, LoadedModel]) -> None:
    spread = both[1]
    assert sum(parameter.is_meta for parameter in spread.model.parameters()) > 9
    assert spread.device == torch.device("cpu")
    texts = [Text("w7 w8", "w9 w10 w70"), Text("w17", "w80 w11")]
    one, two = (read_activations(m, texts, point="resid_post", readout="response_mean") for m in both)
    assert _apart(one, two) < 1e-6
    steering = canonical_program("llama", intervention("add", "mlp_out", 1))
    fitted = random_texts(40, 2)
    edits, same = (solve(m, steering, [Stage(1, "both", 1), Stage(2, "attn", 2)], fitted).low_rank for m in both)
    assert {name.rsplit(".", 1)[-1] for name in edits} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, edit in edits.items():
        assert _apart(same[name].B @ same[name].A, edit.B @ edit.A) < 1e-6
    ablation = canonical_program("llama", intervention("ablate", "resid_post", 1))
    edits, same = (solve(m, ablation, [Stage(1, "both", 1)], fitted).low_rank for m in both)
    assert edits["model.layers.1.mlp.up_proj"].rank == 2  # a pair of neurons, whose rows were read from the disk
    for name, edit in edits.items():
        assert _apart(same[name].B @ same[name].A, edit.B @ edit.A) < 1e-5
    states, same_states = (final_states(m, TEXTS, steering).response for m in both)
    assert _apart(states, same_states) < 1e-6


def _apart(one: Tensor, two: Tensor) -> float:
    """Their distance over their size: how sums are rounded depends on where in memory the weights lie."""
    return float(torch.dist(one, two) / one.norm())


def test_what_needs_all_weights_at_once_says_so_first(both: tuple[LoadedModel, LoadedModel]) -> None:
    spread = both[1]
    lowering = job(spread, canonical_program("llama", intervention("ablate", "mlp_out", 1)))
    for task, work in (("distill", distill.lower), ("full", full.lower)):
        with pytest.raises(RecipeError, match=rf"compile.{task} needs all weights .*device_map has left \d\d of"):
            work(lowering)
    with pytest.raises(RecipeError, match="device is cpu, and device_map says where"):
        load(spread.source, device="cpu", device_map="auto")
    with pytest.raises(RecipeError, match=r"device_map: found disk: 3GB, cpu: 86720; needed: a GPU's number or cpu"):
        load(spread.source, device_map={"disk": "3GB", "cpu": "86720"})
