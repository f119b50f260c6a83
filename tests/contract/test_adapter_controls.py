"""An adapter's own controls: they measure what PEFT does with it, and leave it as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, encode_pairs, final_states, logprob_margins
from compile_steer.models.reload import reload
from compile_steer.models.text import Pair, Text
from compile_steer.steering.program import Program
from compile_steer.verification.controls import _factors, _norm, _randomised, adapter_controls
from compile_steer.verification.reference import Reference
from tests.helpers.tiny import build, intervention, revision, saved, tokenizer

PAIRS = [Pair(Text(f"w{n} w9", f"w4{n % 10} w50"), Text(f"w{n} w9", "w51 w60 w7"), f"w{n} w9") for n in range(10, 16)]


def adapter(folder: Path, rank: int = 3) -> LoadedModel:
    """A random adapter, alpha unlike the rank, on Linears and the embeddings, from disk through stock PEFT."""
    base = saved("llama", folder / "base")
    torch.manual_seed(4)
    config = LoraConfig(r=rank, lora_alpha=5, target_modules=["o_proj", "down_proj", "embed_tokens"])
    model: Any = get_peft_model(build("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(str(folder / "adapter"))
    return reload(folder / "adapter", base)


def reference(base: LoadedModel) -> Reference:
    """What the controls read of one: four control pairs, and two of them as another behaviour's."""
    pairs, program = encode_pairs(base, PAIRS), Program((intervention(layer=1),), base.id, base.revision)

    others = encode_pairs(base, PAIRS[:2])

    def scaled(scale: float) -> tuple[torch.Tensor, float]:
        states, unsteered = (final_states(base, pairs[:2], program.scaled(at)).response for at in (scale, 0.0))
        return states, divergence(base.model, states, base.model, unsteered).mean

    stand_in = SimpleNamespace(
        model=base,
        scaled=scaled,
        other_pairs=others,
        other_margins=logprob_margins(base, others),
        context=SimpleNamespace(seed=3, data=SimpleNamespace(test=PAIRS[:4], other_behaviour=PAIRS[:2])),
        margins=SimpleNamespace(base=logprob_margins(base, pairs)),
        heldout=pairs[:2],
    )
    return cast(Reference, stand_in)


def test_controls_are_the_adapters_effects_at_other_scales_and_of_other_weights(tmp_path: Path) -> None:
    one = adapter(tmp_path)
    base = LoadedModel(build("llama"), tokenizer(), "tiny-llama", revision("llama"), "")
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    compiled = logprob_margins(one, encode_pairs(one, PAIRS))
    controls = adapter_controls(reference(base), one, final_states(one, encode_pairs(one, PAIRS)[:2]), compiled)
    assert controls.n_pairs == 4 and len(controls.random) == 3
    assert [one.scale for one in controls.scales] == [0.0, 0.5, 1.0, -1.0] and controls.scales[0].kl_remaining is None
    changes = compiled - logprob_margins(base, encode_pairs(base, PAIRS))
    assert controls.effect == pytest.approx(float(changes[:4].mean()), abs=1e-5)
    assert controls.other_behaviour == pytest.approx(float(changes[:2].mean()), abs=1e-5)
    for scale, measured in ((-1.0, controls.negated), (0.5, controls.halved)):
        other = adapter(tmp_path)
        for _A, B in _factors(other):
            B.mul_(scale)
        expected = logprob_margins(other, encode_pairs(other, PAIRS[:4])) - logprob_margins(
            base, encode_pairs(base, PAIRS[:4])
        )
        assert measured == pytest.approx(float(expected.mean()), abs=1e-4)
    assert (
        len({round(value, 6) for value in [controls.effect, controls.negated, controls.halved, *controls.random]}) == 6
    )
    after = one.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    np.testing.assert_allclose(logprob_margins(one, encode_pairs(one, PAIRS)), compiled, atol=1e-6)
    assert isinstance(one.model, PeftModel)


def test_random_adapters_have_the_norm_of_every_module(tmp_path: Path) -> None:
    one = adapter(tmp_path)
    kept = [(A.clone(), B.clone()) for A, B in _factors(one)]
    assert len(kept) == 2 * 4 + 1
    with _randomised(one, 7):
        for (A, B), (before_A, before_B) in zip(_factors(one), kept, strict=True):
            assert float(torch.linalg.norm(B @ A)) == pytest.approx(
                float(torch.linalg.norm(before_B @ before_A)), rel=1e-4
            )
            assert float(_norm(A, B)) == pytest.approx(float(torch.linalg.norm(B @ A)), rel=1e-4)
            assert not torch.allclose(A, before_A, atol=0.1)
