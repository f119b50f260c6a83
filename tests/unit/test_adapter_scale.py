"""The adapter's scale against the program's scale."""

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
from compile_steer.verification.controls import _factors, adapter_scales
from compile_steer.verification.gates import judged
from compile_steer.verification.parity import AdapterScale, Parity
from tests.helpers.verification import VerifierCase, recipe


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("case"), long=0)


@pytest.fixture
def adapter(case: VerifierCase) -> Iterator[LoadedModel]:
    yield reload(case.adapter(), case.base)


@pytest.fixture(scope="module")
def parity(case: VerifierCase) -> Parity:
    return case.parity_of(case.adapter())


def scales_of(case: VerifierCase, adapter: LoadedModel) -> list[AdapterScale]:
    return adapter_scales(case.reference, adapter, final_states(adapter, case.reference.heldout))


def with_scales(parity: Parity, *scales: AdapterScale) -> Parity:
    assert parity.adapter is not None
    return replace(parity, adapter=replace(parity.adapter, scales=list(scales)))


def test_each_scale_is_compared_with_the_hooks_at_that_scale(case: VerifierCase, adapter: LoadedModel) -> None:
    texts, model = case.reference.heldout[:4], case.base.model
    measured = {one.scale: one for one in scales_of(case, adapter)}
    assert list(measured) == [0.0, 0.5, 1.0, -1.0]
    base = final_states(case.base, texts).response
    for scale in (0.5, 1.0, -1.0):
        other = reload(case.folder / "adapter", case.base)
        for _A, B in _factors(other):
            B.mul_(scale)
        steered = final_states(case.base, texts, case.program.scaled(scale)).response
        kl = divergence(model, steered, other.model, final_states(other, texts).response).mean
        assert measured[scale].kl == pytest.approx(kl, rel=1e-3)
        kl_base = divergence(model, steered, model, base).mean
        assert measured[scale].kl_remaining == pytest.approx(kl / kl_base, rel=1e-3)
    assert len({round(one.kl, 6) for one in measured.values()}) == 4


def test_at_scale_0_it_is_the_base_and_afterwards_what_it_was(case: VerifierCase, adapter: LoadedModel) -> None:
    before = final_states(adapter, case.reference.heldout[:4]).response
    zero = scales_of(case, adapter)[0]
    # Base and adapter lie at other places in memory, so that their states can differ by rounding.
    assert (zero.scale, zero.kl_remaining) == (0.0, None) and zero.kl < 1e-9
    assert torch.equal(final_states(adapter, case.reference.heldout[:4]).response, before)


def test_an_adapter_that_brings_more_than_itself_is_not_the_base_at_scale_0(
    case: VerifierCase, adapter: LoadedModel
) -> None:
    norm = next(module for name, module in adapter.model.named_modules() if name.endswith("layers.2.input_layernorm"))
    norm.weight.data = 1.3 * norm.weight  # what equals the base is in its memory
    assert scales_of(case, adapter)[0].kl > 1e-4


def test_only_scale_0_is_a_gate(parity: Parity) -> None:
    gates, others = recipe().verify.gates, [AdapterScale(0.5, 9.0, 9.0), AdapterScale(-1.0, 9.0, 9.0)]
    assert parity.adapter is not None
    assert parity.adapter.scales[0].scale == 0 and parity.adapter.scales[0].kl < 1e-9
    assert judged(with_scales(parity, parity.adapter.scales[0], *others), gates).reasons == parity.reasons
    off = with_scales(parity, AdapterScale(0.0, 2e-6, None), *others)
    (reason,) = set(judged(off, gates).reasons) - set(parity.reasons)
    assert reason == "KL(base||adapter at scale 0) 2.00e-06 nats a token: something else has changed"


def test_a_checkpoint_has_no_adapter_scale(case: VerifierCase) -> None:
    assert case.parity_of(case.merged()).adapter is None


def test_the_terminal_shows_the_scales(parity: Parity) -> None:
    stream = StringIO()
    shown = with_scales(parity, AdapterScale(0.0, 0.0, None), AdapterScale(0.5, 0.1, 0.021))
    print_parities(Console(file=stream, width=300), [shown])
    assert "adapter scale against program scale: x0 the base, x0.5 remaining KL 2.10%" in stream.getvalue()
    assert "for scale 1 alone" not in stream.getvalue()
    assert str(AdapterScale(0.0, 2e-6, None)) == "x0 2.0e-06 nats/token from the base"


def test_of_an_adapter_that_does_not_follow_its_scale_it_is_said(parity: Parity) -> None:
    shown = with_scales(
        parity, AdapterScale(0.0, 0.0, None), AdapterScale(0.5, 0.1, 0.2), AdapterScale(-1.0, 9.0, 13.71)
    )
    assert shown.adapter is not None
    remark = "it is for scale 1 alone (x-1 remaining KL 1371.00%); compile.dial: true makes one that follows its scale"
    assert shown.adapter.scale_remark == remark
    stream = StringIO()
    print_parities(Console(file=stream, width=300), [shown])
    assert remark in stream.getvalue()
