"""From weights back to vectors: what was compiled is read off again, and what no vector explains is said so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.export.merged import merged_model
from compile_steer.lowering import exact
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.decompile import Decompiled, decompile
from tests.helpers.tiny import build, intervention, loaded, program, random_patch

Save = Callable[[str], LoadedModel]


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


PAIRS = tuple(Pair(Text(words(n, 4), words(n + 50, 9)), Text(words(n, 4), words(n + 90, 7)), "") for n in range(12))
BEHAVIOUR = Behaviour(PAIRS, (), (), tuple(Text(words(n, 3), words(n + 9, 8)) for n in range(200, 208)), (), (), {})


def compiled(one: LoadedModel, patch: WeightPatch) -> LoadedModel:
    return replace(one, model=merged_model(one.source, patch).eval().requires_grad_(False), id="compiled")


def read_off(one: LoadedModel, other: LoadedModel) -> Decompiled:
    return decompile(one, other, BEHAVIOUR, Progress())


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gpt_neox"])
def test_compile_then_decompile_gives_the_directions_back(family: str, saved: Save) -> None:
    one = saved(family)
    steering = canonical(
        program(family, intervention(layer=1, seed=1), intervention("add", "mlp_out", 3, coefficient=-0.8, seed=2))
    )
    assert exact.bias_refusal(steering, one.layout) is None
    decompiled = read_off(one, compiled(one, exact.bias_patch(steering, one.layout)))
    assert [i.site.layer for i in decompiled.program.interventions] == [1, 3]
    for got, expected in zip(decompiled.program.interventions, steering.interventions, strict=True):
        # What a sublayer writes reaches the stream times the family's residual multiplier, points are of the stream.
        assert float(cosine_similarity(got.vector, expected.coefficient * expected.vector, dim=0)) > 0.9999
        assert float(got.vector.norm()) == pytest.approx(
            abs(expected.coefficient) * float(expected.vector.norm()), rel=1e-3
        )
    assert all(block.explained > 0.9999 for block in decompiled.blocks)
    assert decompiled.explained > 0.9999


def test_a_change_that_is_no_constant_is_not_called_one(saved: Save) -> None:
    one = saved("llama")
    decompiled = read_off(one, compiled(one, random_patch(one)))
    assert [i.site.layer for i in decompiled.program.interventions] == [1, 2]
    assert all(block.explained < 0.6 for block in decompiled.blocks)
    assert decompiled.explained < 0.6


def test_the_base_itself_and_another_shape_are_refused(saved: Save) -> None:
    one = saved("llama")
    with pytest.raises(ArtifactError, match="nothing to decompile"):
        read_off(one, compiled(one, WeightPatch()))
    other = replace(loaded("llama"), model=build("llama", num_hidden_layers=2), id="shallow")
    with pytest.raises(ArtifactError, match="shallow has 2 blocks of width 32, the base 4 of 32"):
        read_off(one, other)


def test_the_program_it_leaves_is_one_that_loads(saved: Save, tmp_path: Path) -> None:
    one = saved("llama")
    decompiled = read_off(one, compiled(one, exact.bias_patch(program("llama", intervention()), one.layout)))
    decompiled.program.save(tmp_path / "found.safetensors")
    again = Program.load(tmp_path / "found.safetensors")
    assert torch.equal(again.interventions[0].vector, decompiled.program.interventions[0].vector)
