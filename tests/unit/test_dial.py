"""The adapter's scale against the program's coefficient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload
from compile_steer.report.terminal import print_parities
from compile_steer.verify.adapter_controls import _factors
from compile_steer.verify.adapter_scale import Dial, dials
from compile_steer.verify.parity import Parity, judge
from tests.helpers.verification import VerifierCase, recipe


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("scene"), long=0)


@pytest.fixture
def adapter(scene: VerifierCase) -> Iterator[LoadedModel]:
    yield reload(scene.adapter(), scene.base)


@pytest.fixture(scope="module")
def parity(scene: VerifierCase) -> Parity:
    return scene.parity_of(scene.adapter())


def test_each_scale_is_held_against_the_hooks_at_that_scale(scene: VerifierCase, adapter: LoadedModel) -> None:
    texts, model = scene.reference.dial_texts, scene.base.model
    found = {one.scale: one for one in dials(scene.reference, adapter)}
    assert list(found) == [0.0, 0.5, 1.0, -1.0]
    base = final_states(scene.base, texts).response
    for scale in (0.5, 1.0, -1.0):
        other = reload(scene.folder / "adapter", scene.base)
        for _A, B in _factors(other):
            B.mul_(scale)
        wanted = final_states(scene.base, texts, scene.program.scaled(scale)).response
        kl = divergence(model, wanted, other.model, final_states(other, texts).response).mean
        assert found[scale].kl == pytest.approx(kl, rel=1e-3)
        assert found[scale].share == pytest.approx(kl / divergence(model, wanted, model, base).mean, rel=1e-3)
    assert len({round(one.kl, 6) for one in found.values()}) == 4


def test_at_scale_0_it_is_the_base_and_afterwards_what_it_was(scene: VerifierCase, adapter: LoadedModel) -> None:
    before = final_states(adapter, scene.reference.dial_texts).response
    zero = dials(scene.reference, adapter)[0]
    # Base and adapter lie at other places in memory, so that their states can differ by rounding.
    assert (zero.scale, zero.share) == (0.0, None) and zero.kl < 1e-9
    assert torch.equal(final_states(adapter, scene.reference.dial_texts).response, before)


def test_an_adapter_that_brings_more_than_itself_is_not_the_base_at_scale_0(
    scene: VerifierCase, adapter: LoadedModel
) -> None:
    norm = next(module for name, module in adapter.model.named_modules() if name.endswith("layers.2.input_layernorm"))
    norm.weight.data.mul_(1.3)
    assert dials(scene.reference, adapter)[0].kl > 1e-4


def test_only_scale_0_is_a_gate(parity: Parity) -> None:
    gates = recipe().verify.gates
    assert parity.dial[0].scale == 0 and parity.dial[0].kl < 1e-9
    other = [Dial(0.5, 9.0, 9.0), Dial(-1.0, 9.0, 9.0)]
    assert judge(replace(parity, dial=[parity.dial[0], *other]), gates) == parity.reasons
    off = replace(parity, dial=[Dial(0.0, 2e-6, None), *other])
    (new,) = set(judge(off, gates)) - set(parity.reasons)
    assert new == "KL(base||adapter at scale 0) 2.00e-06 nats a token: something else has changed"


def test_a_checkpoint_has_no_dial(scene: VerifierCase) -> None:
    assert scene.parity_of(scene.merged()).dial == []


def test_the_terminal_shows_it(parity: Parity) -> None:
    stream = StringIO()
    print_parities(
        Console(file=stream, width=300), [replace(parity, dial=[Dial(0.0, 0.0, None), Dial(0.5, 0.1, 0.021)])]
    )
    assert "dial against the coefficient's: x0 the base, x0.5 share 2.10%" in stream.getvalue()
    assert str(Dial(0.0, 2e-6, None)) == "x0 2.0e-06 nats/token off the base"
