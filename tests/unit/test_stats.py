"""Statistics compared with hand computations, simulations and known limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compile_steer.stats import (
    EQUIVALENCE_POWER,
    LEVEL,
    Interval,
    auroc,
    bootstrap_effect_retained,
    bootstrap_mean,
    bootstrap_ratio,
    equivalence,
    equivalence_sample_size,
    outlier_p,
    power_analysis,
    rank_p,
    sign_flip,
)


def sample(seed: int, n: int, mean: float = 0.0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal(n)


def normal(seed: int, runs: int, n: int, mean: float, spread: float) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((runs, n))


# ------------------------------------------------------------------------------------- equivalence


def test_equivalence_is_the_hand_computation() -> None:
    # mean 0.3, sd sqrt(0.5 / 4), n 5: standard error 0.158114; t of 4 degrees at 0.95 is 2.131847
    result = equivalence("log-likelihood margin", np.array([0.1, 0.8, -0.1, 0.6, 0.1]), 0.7)
    assert result.difference == pytest.approx(0.3) and result.n == 5
    error = math.sqrt(0.58 / 4) / math.sqrt(5)
    assert result.low == pytest.approx(0.3 - 2.131847 * error, abs=1e-5)
    assert result.high == pytest.approx(0.3 + 2.131847 * error, abs=1e-5)
    # The upper test is the harder: t = (0.7 - 0.3) / 0.170294 = 2.34888, one-sided p of 4 degrees 0.03930
    assert result.p == pytest.approx(0.0393, abs=2e-4)
    assert result.equivalent and result.high < 0.7


@pytest.mark.parametrize("margin", [0.05, 0.3, 0.45, 0.66, 0.67, 0.9])
def test_equivalent_exactly_if_the_interval_lies_inside_the_margin(margin: float) -> None:
    result = equivalence("score", np.array([0.1, 0.8, -0.1, 0.6, 0.1]), margin)
    assert result.equivalent == (-margin < result.low and result.high < margin)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_difference_of_the_margin_passes_with_at_most_5_percent(sign: float) -> None:
    values = normal(0, 500, 12, sign * 0.2, 0.15)
    rate = float(np.mean([equivalence("log-likelihood margin", row, 0.2).equivalent for row in values]))
    assert rate <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 500)


@pytest.mark.parametrize(("spread", "margin"), [(0.3, 0.2), (0.5, 0.1), (0.05, 0.2)])
def test_the_sample_size_has_95_percent_power(spread: float, margin: float) -> None:
    count = equivalence_sample_size(spread, margin)
    passed = [equivalence("score", row, margin).equivalent for row in normal(1, 400, count, 0.0, spread)]
    assert np.mean(passed) >= EQUIVALENCE_POWER - 3 * math.sqrt(EQUIVALENCE_POWER * (1 - EQUIVALENCE_POWER) / 400)
    if count > 2:
        fewer = max(2, count // 2)
        assert (
            np.mean([equivalence("score", row, margin).equivalent for row in normal(2, 100, fewer, 0.0, spread)])
            < EQUIVALENCE_POWER
        )


def test_the_sample_size_for_independent_answers() -> None:
    # Two answers, each 0 or 1 by a coin: (1.645 + 1.960)^2 x 0.5 / 0.05^2
    assert equivalence_sample_size(math.sqrt(0.5), 0.05) == pytest.approx(2599, abs=4)
    assert equivalence_sample_size(0.0, 0.05) == 2


def test_equal_differences_have_no_interval() -> None:
    same, other = (equivalence("log-likelihood margin", np.full(7, value), 0.05) for value in (0.01, 0.1))
    assert (same.low, same.high, same.p, same.equivalent) == (0.01, 0.01, 0.0, True)
    assert (other.p, other.equivalent, other.enough) == (1.0, False, True)


def test_a_few_equal_scores_are_underpowered() -> None:
    """Were one prompt in twenty another, 58 would show none more often than once in twenty."""
    few, enough = (equivalence("score", np.zeros(n), 0.05) for n in (58, 59))
    assert 0.95**59 < 0.05 < 0.95**58 and few.needed == enough.needed == 59
    assert not few.equivalent and few.p == pytest.approx(0.95**58) and enough.equivalent
    assert str(few).endswith("underpowered: needs 59 prompts, there are 58")
    assert power_analysis("equivalence", "score", 0.05, 0.0, 12, "all the same").needed == 59
    assert power_analysis("equivalence", "log-likelihood margin", 0.05, 0.0, 12, "all the same").needed == 2
    assert equivalence("score", np.zeros(3), 1.0).equivalent


@pytest.mark.parametrize("values", [[], [0.1], [0.1, math.nan, 0.2], [math.inf, 0.0]])
def test_too_few_or_infinite_differences_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="needed: two or more, all finite"):
        equivalence("score", np.array(values), 0.1)


@pytest.mark.parametrize(("spread", "margin"), [(0.1, 0.0), (0.1, -1.0), (-0.1, 1.0), (math.nan, 1.0), (0.1, math.inf)])
def test_an_invalid_margin_or_spread_is_refused(spread: float, margin: float) -> None:
    with pytest.raises(ValueError, match="needed: a margin above 0"):
        equivalence_sample_size(spread, margin)


def test_equivalence_and_power_as_text() -> None:
    few = equivalence("score", np.array([0.0, 1.0, 0.0, 0.0]), 0.05)
    assert f"underpowered: needs {few.needed:,} prompts, there are 4" in str(few)
    assert str(equivalence("score", np.array([0.9, 0.2, 0.8, 0.3]), 0.05)).endswith("of +-0.05, not equivalent")
    assert str(equivalence("log-likelihood margin", np.full(3, 0.01), 0.08)) == (
        "log-likelihood margin +0.010 [+0.010, +0.010] of +-0.08 nats/token, equivalent"
    )
    assert "needs 2,601 test prompts for 95% power; there are 10, too few (a coin)" in str(
        power_analysis("equivalence", "score", 0.05, math.sqrt(0.5), 10, "a coin")
    )


# --------------------------------------------------------------------------- intervals over the texts


def test_a_ratio_is_resampled_over_texts_not_tokens() -> None:
    kl = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.4, 0.3]).repeat_interleave(50)
    texts, ones = torch.arange(6).repeat_interleave(50), torch.ones(300)
    by_text = bootstrap_ratio(kl, ones, texts, seed=0)
    by_token = bootstrap_ratio(kl, ones, torch.arange(300), seed=0)
    assert by_text.value == by_token.value == pytest.approx(0.4)
    assert by_text.high - by_text.low > 4 * (by_token.high - by_token.low)


def test_texts_are_weighted_by_their_tokens() -> None:
    interval = bootstrap_ratio(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([5, 5, 9]), seed=0
    )
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("below", [0.0, math.nan])
def test_a_ratio_without_a_finite_divisor_is_refused(below: float) -> None:
    with pytest.raises(ValueError, match="no finite ratio"):
        bootstrap_ratio(torch.ones(4), torch.full((4,), below), torch.arange(4), seed=0)


def test_the_interval_of_a_mean_is_near_the_normal_one_for_many_values() -> None:
    values = sample(0, 400, mean=2.0)
    interval = bootstrap_mean(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_one_seed_gives_one_interval() -> None:
    values = sample(3, 30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize("values", [[0.7], [0.1] * 7, [0.0, 0.0]])
def test_values_without_spread_have_an_interval_without_width(values: list[float]) -> None:
    interval = bootstrap_mean(np.array(values), seed=0)
    assert (interval.value, interval.low, interval.high) == pytest.approx((values[0],) * 3)


def test_one_success_in_many_has_an_interval_from_zero() -> None:
    interval = bootstrap_mean(np.array([0.0] * 9 + [1.0]), seed=0)
    assert interval.low == pytest.approx(0.0)
    assert 0.1 < interval.high < 0.6


def test_an_exact_compile_has_a_recovery_of_one() -> None:
    base, effect = sample(0, 25), sample(1, 25, mean=1.0)
    recovery = bootstrap_effect_retained(base, base + effect, base + effect, seed=0)
    assert recovery is not None
    assert (recovery.value, recovery.low, recovery.high) == pytest.approx((1.0, 1.0, 1.0))


def test_recovery_is_linear_in_the_effect() -> None:
    base, effect = sample(0, 25), sample(1, 25, mean=1.0)
    for share in (0.0, 0.5, -0.5):
        recovery = bootstrap_effect_retained(base, base + effect, base + share * effect, seed=0)
        assert recovery is not None
        assert (recovery.value, recovery.low, recovery.high) == pytest.approx((share, share, share))


def test_recovery_is_the_ratio_of_mean_effects_and_its_interval_holds_it() -> None:
    base, effect = sample(0, 40), sample(1, 40, mean=1.0)
    compiled = base + 0.8 * effect + 0.2 * sample(2, 40)
    recovery = bootstrap_effect_retained(base, base + effect, compiled, seed=0)
    assert recovery is not None
    assert recovery.value == pytest.approx((compiled - base).mean() / effect.mean())
    assert recovery.low < recovery.value < recovery.high
    assert recovery.high - recovery.low < 0.4


def test_recovery_pairs_the_prompts_so_that_their_spread_does_not_count() -> None:
    spread, effect = 100.0 * sample(0, 40), sample(1, 40, mean=1.0)
    compiled = 0.8 * effect + 0.2 * sample(2, 40)
    narrow = bootstrap_effect_retained(np.zeros(40), effect, compiled, seed=0)
    wide = bootstrap_effect_retained(spread, spread + effect, spread + compiled, seed=0)
    assert narrow is not None
    assert wide is not None
    assert (wide.low, wide.high) == pytest.approx((narrow.low, narrow.high))


def test_where_steering_does_nothing_there_is_no_recovery() -> None:
    base = sample(0, 12)
    assert bootstrap_effect_retained(base, base, base + 1.0, seed=0) is None
    assert bootstrap_effect_retained(base, base[::-1], base + 1.0, seed=0) is None


def test_a_recovery_of_constant_effects_has_no_width() -> None:
    recovery = bootstrap_effect_retained(np.zeros(5), np.full(5, 2.0), np.full(5, 1.5), seed=0)
    assert recovery == Interval(0.75, 0.75, 0.75)


def test_recovery_of_contradictory_effects_is_uncertain() -> None:
    base = np.zeros(4)
    recovery = bootstrap_effect_retained(base, np.array([1.0, -1.0, 1.0, 1.0]), np.array([1.0, 0.5, 0.2, 1.0]), seed=0)
    assert recovery is None or recovery.low < recovery.value, "four prompts that disagree prove nothing"


def test_an_interval_as_text() -> None:
    assert str(Interval(0.12345, -1.0, 2.5)) == "0.123 [-1.000, 2.500]"


# ------------------------------------------------------------------------------- tests against chance


def test_auroc_counts_ties_by_half() -> None:
    assert auroc(np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])) == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 0.5) / 6)


def test_sign_flip_enumerates_all_flips_of_few_effects() -> None:
    assert sign_flip(np.array([0.3, 0.1, 0.7]), seed=0) == pytest.approx(1 / 8)
    assert sign_flip(-np.array([0.3, 0.1, 0.7]), seed=0) == 1.0


def test_a_rank_ends_at_one_in_n_plus_1_and_an_outlier_s_p_value_does_not() -> None:
    others = sample(0, 20).tolist()
    assert rank_p(50.0, others) == pytest.approx(1 / 21) and rank_p(-50.0, others) == 1.0
    assert outlier_p(50.0, others) < 1e-9 and outlier_p(-50.0, others) > 1 - 1e-9
    assert outlier_p(float(np.mean(others)), others) == pytest.approx(0.5)
    assert (outlier_p(1.0, [0.5, 0.5]), outlier_p(0.5, [0.5, 0.5])) == (0.0, 1.0)


def test_the_power_of_a_difference_is_the_formula() -> None:
    plan = power_analysis("difference", "log-likelihood margin", 0.1, 0.5, 24, "assumed")
    assert plan.needed == math.ceil(((1.959964 + 0.841621) * 0.5 / 0.1) ** 2) == 197
    assert plan.detectable == pytest.approx(2.801585 * 0.5 / math.sqrt(24))
    assert str(plan) == (
        "log-likelihood margin: a change of 0.1 nats/token needs 197 test pairs for 80% power; there are 24, too few, "
        "which detect 0.29 (assumed)"
    )
