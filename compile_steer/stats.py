"""Statistics that the reports rest on: bootstrap intervals, tests against chance, equivalence tests and power.

scipy is imported inside the functions that need it, so that a report can be loaded and shown without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.05
POWER = 0.8
# Where the samples suffice, equivalence is a gate: with 80 % power one perfect artifact in five would fail it by chance.
EQUIVALENCE_POWER = 0.95

Measure = Literal["log-likelihood margin", "score", "repetition", "capability"]
Test = Literal["difference", "equivalence"]
# (unit, what a sample is, whether a sample counts 0 or 1, mostly)
_MEASURES: dict[Measure, tuple[str, str, bool]] = {
    "log-likelihood margin": (" nats/token", "pairs", False),
    "score": ("", "prompts", True),
    "repetition": (" of 3-grams", "prompts", False),
    "capability": ("", "questions", True),
}


@dataclass(frozen=True)
class Interval:
    """A point estimate with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, *, seed: int) -> Interval:
    """Return the mean of `values` [n] with its bias-corrected and accelerated bootstrap interval (Efron 1987)."""
    interval = _bootstrap((values,), lambda x, axis: np.asarray(np.mean(x, axis=axis)), seed)
    if interval is None:
        raise ValueError("a mean of finite values has a finite interval")
    return interval


def bootstrap_ratio(above: Tensor, below: Tensor, texts: Tensor, *, seed: int) -> Interval:
    """Return the sum of `above` over the sum of `below`, both [n_tokens], resampled over `texts` [n_tokens] of the tokens.

    Tokens of one text share its topic, so they are not independent, and an interval over tokens would be too narrow.

    Raises:
        ValueError: values that are not finite, or a `below` that is 0 in nearly every text.
    """
    owners = texts.numpy()
    sums = [np.bincount(owners, weights=values.double().numpy())[np.unique(owners)] for values in (above, below)]

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        divisor = b.sum(axis=axis)
        return np.asarray(a.sum(axis=axis) / np.where(divisor == 0, np.nan, divisor))

    interval = _bootstrap((sums[0], sums[1]), ratio, seed)
    if interval is None or not math.isfinite(interval.value):
        raise ValueError("found no finite ratio; needed: finite values, and a divisor above 0 in nearly every text.")
    return interval


def bootstrap_effect_retained(
    base: np.ndarray, steered: np.ndarray, compiled: np.ndarray, *, seed: int
) -> Interval | None:
    """Return (compiled - base) / (steered - base) of mean scores [n], resampled over prompts.

    None where the steered score does not differ from the base's, on the whole or in some resamples: no effect can be
    retained then.
    """
    if math.isclose(float(np.mean(steered - base)), 0.0, abs_tol=1e-9):
        return None

    def ratio(b: np.ndarray, s: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
        effect = np.mean(s - b, axis=axis)
        return cast(np.ndarray, np.mean(c - b, axis=axis) / np.where(effect == 0, np.nan, effect))

    return _bootstrap((base, steered, compiled), ratio, seed)


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int) -> Interval | None:
    """Return None where no finite interval exists, because some resamples have no value."""
    from scipy.stats import bootstrap

    value = float(statistic(*samples, axis=0))
    if all(np.ptp(sample - samples[0]) == 0 for sample in samples) and np.ptp(samples[-1]) == 0:
        return Interval(value, value, value)  # nothing to resample: scipy would answer NaN
    paired = len(samples) > 1
    # BCa cannot correct what has no skew to measure (then scipy answers NaN); plain percentiles can.
    methods: tuple[Literal["BCa", "percentile"], ...] = ("percentile",) if paired else ("BCa", "percentile")
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rng = np.random.default_rng(seed)
            result = bootstrap(
                samples, statistic, paired=paired, n_resamples=2000, method=method, vectorized=True, rng=rng
            )
        low, high = (float(bound) for bound in result.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return Interval(value, low, high)
    return None


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the chance that one of `positive` [n] is above one of `negative` [m], ties by half (Mann and Whitney's U)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def sign_flip(effects: np.ndarray, seed: int) -> float:
    """Return the one-sided p-value of a mean above 0 of paired `effects` [n]: the fraction of sign flips with as large a mean."""
    from scipy.stats import permutation_test

    result = permutation_test(
        (effects,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        alternative="greater",
        n_resamples=9999,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def rank_p(effect: float, others: Sequence[float]) -> float:
    """Return the permutation p-value of `effect` among `others`, which is never below 1 / (1 + n)."""
    return (1 + sum(other >= effect for other in others)) / (1 + len(others))


def outlier_p(effect: float, others: Sequence[float]) -> float:
    """Return how likely one more draw from the distribution of `others` is as large as `effect`: a t-test of one value.

    The effect of a direction is to first order its inner product with the gradient, which over random directions is
    normal to within 1/d_model. `rank_p` ends at 1 / (1 + n); this does not, so that a candidate that was chosen as the
    best of several grid points can be told from chance.
    """
    from scipy.stats import t

    n = len(others)
    mean, spread = float(np.mean(others)), float(np.std(others, ddof=1))
    if spread == 0.0:
        return 0.0 if effect > mean else 1.0
    return float(t.sf((effect - mean) / (spread * math.sqrt(1 + 1 / n)), n - 1))


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) of paired differences, compiled minus steered, in nats per token or points of a score.

    That no difference was detected proves nothing; equivalence is shown where the interval of the mean difference lies
    inside +-`margin` (Schuirmann 1987). Its coverage is 1 - 2 `level`: 90 % of a single test.
    """

    measure: Measure
    margin: float
    difference: float  # mean
    low: float  # of its interval
    high: float
    p: float  # the larger p-value of the two tests
    spread: float  # standard deviation of a difference
    n: int
    needed: int  # samples that would show the margin with 95 % power if there is no difference
    equivalent: bool
    level: float = LEVEL  # of each of the two tests

    @property
    def enough(self) -> bool:
        """True if the test has the power to show the margin."""
        return self.n >= self.needed

    @property
    def different(self) -> bool:
        """True if the whole interval lies outside of the margin: the opposite of equivalence is shown."""
        return self.low >= self.margin or self.high <= -self.margin

    def __str__(self) -> str:
        unit, samples, _counted = _MEASURES[self.measure]
        result = "equivalent" if self.equivalent else "not equivalent"
        if not self.equivalent and not self.enough and not self.different:
            result = f"underpowered: needs {self.needed:,} {samples}, there are {self.n}"
        coverage = "" if self.level == LEVEL else f"; {1 - 2 * self.level:.2%}"
        interval = f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}{coverage}]"
        return f"{self.measure} {interval} of +-{self.margin:.3g}{unit}, {result}"


def equivalence(
    measure: Measure, differences: np.ndarray, margin: float, level: float = LEVEL, seen: float | None = None
) -> Equivalence:
    """Test paired differences [n] against +-`margin`, both in nats per token or points, each of the two tests at `level`.
    `seen` is how many independent samples the differences rest on: so few that a change of a whole point in a fraction
    `margin` of all could have stayed unseen show nothing. Left out it is n, and counts only if no two differences differ.

    Raises:
        ValueError: fewer than two differences, one that is not finite, or a margin that is not above 0.
    """
    from scipy.stats import ttest_1samp

    if len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"found {len(differences)} differences, {differences}; needed: two or more, all finite.")
    n, mean, counted = len(differences), float(differences.mean()), _MEASURES[measure][2]
    spread = 0.0 if np.ptp(differences) == 0 else float(differences.std(ddof=1))
    needed = equivalence_sample_size(spread, margin, counted=counted, level=level)
    if spread == 0:  # all differences are the same: there is no t statistic
        seen = n if seen is None else seen
        low, high, p = mean, mean, float(abs(mean) >= margin)
    else:
        bounds = ttest_1samp(differences, 0.0).confidence_interval(1 - 2 * level)
        low, high = float(bounds.low), float(bounds.high)
        above = ttest_1samp(differences, -margin, alternative="greater").pvalue
        below = ttest_1samp(differences, margin, alternative="less").pvalue
        p = float(max(above, below))
    if counted and seen is not None:
        p = max(p, (1 - min(margin, 1.0)) ** seen)
        needed = max(needed, math.ceil(equivalence_sample_size(0.0, margin, counted=True, level=level) * n / seen))
    return Equivalence(measure, margin, mean, low, high, p, spread, n, needed, p < level, level)


def equivalence_sample_size(spread: float, margin: float, *, counted: bool = False, level: float = LEVEL) -> int:
    """Return the least number of paired differences with which TOST shows `margin` at `level` with 95 % power.

    It assumes no true difference. The power of both tests at once is at least 2 P(T > t) - 1 with T noncentral t, exact
    except for the case where both fail.

    Args:
        spread: standard deviation of a difference.
        counted: a difference is a whole point or none. If none was seen (`spread` 0), it takes as many samples as would
            have shown one if they were a fraction `margin` of all: (1 - margin)^n below `level`.

    Raises:
        ValueError: a margin that is not above 0, or a spread that is negative or not finite.
    """
    from scipy.stats import nct, norm, t

    if not (margin > 0 and math.isfinite(margin)) or not (spread >= 0 and math.isfinite(spread)):
        raise ValueError(
            f"found margin {margin} and spread {spread}; needed: a margin above 0, a spread of at least 0."
        )
    if spread == 0:
        return max(2, math.ceil(math.log(level) / math.log1p(-margin))) if counted and margin < 1 else 2
    # The normal approximation is always too small, so the search for the exact number only goes upwards.
    z = float(norm.ppf(1 - level) + norm.ppf((1 + EQUIVALENCE_POWER) / 2))
    n = max(2, math.ceil((z * spread / margin) ** 2))
    while 2 * float(nct.sf(t.ppf(1 - level, n - 1), n - 1, margin * math.sqrt(n) / spread)) - 1 < EQUIVALENCE_POWER:
        n += 1
    return n


@dataclass(frozen=True)
class PowerAnalysis:
    """How many samples a paired test needs, computed before anything is measured."""

    measure: Measure
    test: Test
    effect: float  # the minimum detectable effect that is asked for, or the margin of an equivalence test
    spread: float  # assumed standard deviation of a paired difference
    assumption: str  # where the spread is from
    needed: int
    available: int
    detectable: float | None = None  # the effect that the available samples detect

    def __str__(self) -> str:
        unit, samples, _counted = _MEASURES[self.measure]
        change, power = f"equivalence within {self.effect:.3g}{unit}", EQUIVALENCE_POWER
        if self.test == "difference":
            change, power = f"a change of {self.effect:g}{unit}", POWER
        enough = "enough" if self.available >= self.needed else "too few"
        detectable = "" if self.detectable is None else f", which detect {self.detectable:.2g}"
        return (
            f"{self.measure}: {change} needs {self.needed:,} test {samples} for {power:.0%} power; there are "
            f"{self.available}, {enough}{detectable} ({self.assumption})"
        )


def power_analysis(
    test: Test, measure: Measure, effect: float, spread: float, available: int, assumption: str, level: float = LEVEL
) -> PowerAnalysis:
    """Plan a two-sided paired test of means, n = ((z_.975 + z_.8) spread / effect)^2, or one of equivalence at `level`."""
    from scipy.stats import norm

    if test == "equivalence":
        needed = equivalence_sample_size(spread, effect, counted=_MEASURES[measure][2], level=level)
        return PowerAnalysis(measure, test, effect, spread, assumption, needed, available)
    z = float(norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER))
    needed, detectable = max(2, math.ceil((z * spread / effect) ** 2)), z * spread / math.sqrt(available)
    return PowerAnalysis(measure, test, effect, spread, assumption, needed, available, detectable)
