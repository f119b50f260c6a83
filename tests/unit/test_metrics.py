"""Divergences against torch's own, and bootstrap intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from compile_steer.models.divergence import (
    CHUNK_TOKENS,
    Divergence,
    Interval,
    bootstrap_mean,
    bootstrap_recovery,
    chunks,
    divergence,
    kl_divergence,
    log_softmax,
)
from compile_steer.models.forward import lm_head
from tests.helpers.tiny import HIDDEN, loaded


def random_logits(seed: int, n: int = 6, vocab: int = 41, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def sample(seed: int, n: int, mean: float = 0.0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal(n)


# --------------------------------------------------------------------------------------- divergence


def test_kl_is_torch_s_own_and_has_a_direction() -> None:
    log_p, log_q = (random_logits(seed).double().log_softmax(dim=-1) for seed in (0, 1))
    wanted = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(kl_divergence(log_p, log_q), wanted, rtol=1e-5)
    assert not torch.allclose(kl_divergence(log_q, log_p), wanted, rtol=0.1)


def test_kl_of_states_that_differ_by_rounding_is_far_below_an_exact_compile_s_gate() -> None:
    """Rounding of the states alone: what two exact forms of one model differ by."""
    model = loaded("llama").model
    hidden = 9.0 * torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    noise = hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    found = divergence(model, hidden, model, noise)
    assert float(found.kl.min()) >= 0.0
    assert float(found.kl.mean()) < 1e-11


def test_kl_of_half_precision_logits_is_computed_in_single() -> None:
    logits = random_logits(3)
    assert log_softmax(logits.bfloat16()).dtype == torch.float32


def test_two_models_are_compared_chunk_by_chunk_over_all_tokens() -> None:
    llama, granite = loaded("llama").model, loaded("granite").model
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(CHUNK_TOKENS + 37, HIDDEN, generator=generator) for _ in range(2))
    found = divergence(llama, p, granite, q)
    log_p, log_q = log_softmax(lm_head(llama, p)), log_softmax(lm_head(granite, q))
    wanted = functional.kl_div(log_q.double(), log_p.double(), reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(found.kl, wanted, rtol=1e-4)
    assert torch.equal(found.same_top1, log_p.argmax(dim=-1) == log_q.argmax(dim=-1))
    assert float(wanted.min()) > 0.0


def test_the_summaries_of_a_divergence_are_those_of_its_tokens() -> None:
    found = Divergence(torch.tensor([0.0, 3.0, 0.0, 4.0]), torch.tensor([True, False, True, True]))
    assert found.mean == pytest.approx(1.75)
    assert found.rms == pytest.approx(2.5)
    assert found.top1_agreement == pytest.approx(0.75)
    assert Divergence(torch.arange(101.0), torch.ones(101, dtype=torch.bool)).p99 == pytest.approx(99.0)


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (5, [5]), (8, [8]), (19, [8, 8, 3])])
def test_chunks_cover_every_token_once(n: int, sizes: list[int]) -> None:
    parts = [list(range(n))[part] for part in chunks(n, 8)]
    assert [len(part) for part in parts] == sizes
    assert [token for part in parts for token in part] == list(range(n))


# ---------------------------------------------------------------------------------------- intervals


def test_the_interval_of_a_mean_is_near_the_normal_one_for_many_values() -> None:
    values = sample(0, 400, mean=2.0)
    found = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_less_confidence_is_a_narrower_interval_and_one_seed_one_interval() -> None:
    values = sample(3, 30)
    wide, narrow = (bootstrap_mean(values, seed=1, confidence=confidence) for confidence in (0.95, 0.80))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert bootstrap_mean(values, seed=1) == wide
    assert bootstrap_mean(values, seed=2) != wide


@pytest.mark.parametrize("values", [[0.7], [0.1] * 7, [0.0, 0.0]])
def test_values_without_spread_have_an_interval_without_width(values: list[float]) -> None:
    found = bootstrap_mean(np.array(values), seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((values[0],) * 3)


def test_one_success_in_many_leaves_zero_out_of_no_interval() -> None:
    found = bootstrap_mean(np.array([0.0] * 9 + [1.0]), seed=0)
    assert found.low == pytest.approx(0.0)
    assert 0.1 < found.high < 0.6


def test_an_exact_compile_recovers_everything_for_certain() -> None:
    base, effect = sample(0, 25), sample(1, 25, mean=1.0)
    found = bootstrap_recovery(base, base + effect, base + effect, seed=0)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_the_base_recovers_nothing_and_half_the_effect_recovers_half() -> None:
    base, effect = sample(0, 25), sample(1, 25, mean=1.0)
    for share in (0.0, 0.5, -0.5):
        found = bootstrap_recovery(base, base + effect, base + share * effect, seed=0)
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx((share, share, share))


def test_recovery_is_the_ratio_of_mean_effects_and_its_interval_holds_it() -> None:
    base, effect = sample(0, 40), sample(1, 40, mean=1.0)
    compiled = base + 0.8 * effect + 0.2 * sample(2, 40)
    found = bootstrap_recovery(base, base + effect, compiled, seed=0)
    assert found is not None
    assert found.value == pytest.approx((compiled - base).mean() / effect.mean())
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.4


def test_recovery_pairs_the_prompts_so_that_their_spread_does_not_count() -> None:
    spread, effect = 100.0 * sample(0, 40), sample(1, 40, mean=1.0)
    compiled = 0.8 * effect + 0.2 * sample(2, 40)
    narrow = bootstrap_recovery(np.zeros(40), effect, compiled, seed=0)
    wide = bootstrap_recovery(spread, spread + effect, spread + compiled, seed=0)
    assert narrow is not None
    assert wide is not None
    assert (wide.low, wide.high) == pytest.approx((narrow.low, narrow.high))


def test_where_steering_does_nothing_there_is_no_recovery() -> None:
    base = sample(0, 12)
    assert bootstrap_recovery(base, base, base + 1.0, seed=0) is None
    assert bootstrap_recovery(base, base[::-1], base + 1.0, seed=0) is None


def test_a_recovery_of_constant_effects_has_no_width() -> None:
    found = bootstrap_recovery(np.zeros(5), np.full(5, 2.0), np.full(5, 1.5), seed=0)
    assert found == Interval(0.75, 0.75, 0.75)


def test_an_effect_that_some_resamples_lack_does_not_make_the_recovery_certain() -> None:
    base = np.zeros(4)
    found = bootstrap_recovery(base, np.array([1.0, -1.0, 1.0, 1.0]), np.array([1.0, 0.5, 0.2, 1.0]), seed=0)
    assert found is None or found.low < found.value, "four prompts that disagree prove nothing"


def test_an_interval_is_written_with_its_bounds() -> None:
    assert str(Interval(0.12345, -1.0, 2.5)) == "0.123 [-1.000, 2.500]"
