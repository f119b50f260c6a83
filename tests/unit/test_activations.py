"""Activations against plain captures of the model's own forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_steer.common.errors import LayoutError
from compile_steer.models.forward import read_activations
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.steering.sites import POINTS, Point, Site
from tests.helpers.captures import captured, n_hooks
from tests.helpers.tiny import FAMILIES, LAYERS, Padded, build, loaded, logits

TEXTS = [Text("w20 w21 w22", "w30"), Text("w23", "w31 w32 w33 w34 w35"), Text("w24 w25", "w36 w37")]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_the_captured_ones_averaged_over_the_tokens_read(family: str, point: Point) -> None:
    one = loaded(family)
    mean_of = read_activations(one, TEXTS, point=point, readout="response_mean")
    last_of = read_activations(one, TEXTS, point=point, readout="last_prompt")
    for row, text in enumerate(TEXTS):
        encoded = encode(one.tokenizer, text)
        with captured(family, one.model) as streams:
            logits(one.model, Padded.of([encoded], "right"))
        for layer in range(LAYERS):
            states = streams.at(Site(layer, point))[0]
            mean, last = states[encoded.n_prompt :].mean(dim=0), states[encoded.n_prompt - 1]
            size = float(states.abs().max())
            assert torch.allclose(mean_of[row, layer], mean, atol=2e-5 * size)
            assert torch.allclose(last_of[row, layer], last, atol=2e-5 * size)


def test_reading_advances_once_a_text_and_leaves_no_hook() -> None:
    one = loaded("gpt2")
    done: list[float] = []
    before = n_hooks(one.model)
    read_activations(one, TEXTS, point="mlp_out", readout="response_mean", advance=done.append)
    assert sum(done) == len(TEXTS)
    assert n_hooks(one.model) == before


def test_the_first_block_whose_activations_are_not_finite_is_named() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").fill_(torch.inf)
    broken = replace(loaded("llama"), model=model)
    with pytest.raises(LayoutError, match="resid_post 2 are NaN or infinite. Load the model in float32"):
        read_activations(broken, TEXTS, point="resid_post", readout="response_mean")


@pytest.mark.parametrize("point", POINTS)
def test_blocks_above_the_last_one_read_are_not_run(point: Point) -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.down_proj.weight").fill_(torch.inf)
    broken = replace(loaded("llama"), model=model)
    activations = read_activations(broken, TEXTS, point=point, readout="response_mean", through=1)
    whole = read_activations(loaded("llama"), TEXTS, point=point, readout="response_mean")
    assert activations.shape[1] == 2 and torch.equal(activations, whole[:, :2])
