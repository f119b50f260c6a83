"""Tests, corrections and power. The test split is measured once, so its tests need no correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, norm, permutation_test, t

LEVEL, POWER = 0.05, 0.8
_RESAMPLES = 9999


def sign_flip(effects: np.ndarray, seed: int) -> float:
    """One-sided p-value of a mean above 0 of paired effects [n]: the share of sign flips that do as much."""
    found = permutation_test(
        (effects,),
        lambda x, axis: np.mean(x, axis=axis),
        vectorized=True,
        permutation_type="samples",
        alternative="greater",
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def discoveries(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: those below q are false with a rate of at most q."""
    return [float(q) for q in false_discovery_control(p_values)] if p_values else []


def rank_p(effect: float, others: Sequence[float]) -> float:
    """The permutation p-value of `effect` among `others`; never below 1 / (1 + n)."""
    return (1 + sum(other >= effect for other in others)) / (1 + len(others))


def outlier_p(effect: float, others: Sequence[float]) -> float:
    """How likely one more draw of what `others` were drawn from is as large: a t-test of a single value.

    The effect of a direction is to first order its inner product with the gradient, which over directions at
    random is normal to within 1/d_model. Where the ranks end at 1 / (1 + n) this goes on, so that a candidate
    chosen as the best of several cells is told from chance.
    """
    n = len(others)
    mean, spread = float(np.mean(others)), float(np.std(others, ddof=1))
    if spread == 0.0:
        return 0.0 if effect > mean else 1.0
    return float(t.sf((effect - mean) / (spread * math.sqrt(1 + 1 / n)), n - 1))


@dataclass(frozen=True)
class Power:
    """What `there` samples can show of a change of `claim`, two-sided at 5 %, with 80 % power.

    `spread` is the assumed standard deviation of the paired change, `assumption` says where it is from; `needed`
    samples would show the claim, and `detectable` is the least change that those there would show.
    """

    what: str
    claim: float
    spread: float
    assumption: str
    needed: int
    there: int
    detectable: float

    def __str__(self) -> str:
        unit, samples = ("nats/token", "pairs") if self.what == "contrast" else ("", "prompts")
        enough = "enough" if self.there >= self.needed else "too few"
        return (
            f"{self.what}: a change of {self.claim:g} {unit}".rstrip()
            + f" needs {self.needed} test {samples} for 80 % "
            f"power; there are {self.there}, {enough}: they would show {self.detectable:.2g} ({self.assumption})"
        )


def power(what: str, claim: float, spread: float, there: int, assumption: str) -> Power:
    """Sample size of a paired comparison of means in normal approximation: n = ((z_.975 + z_.8) sd / claim)^2."""
    z = float(norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER))
    needed = max(2, math.ceil((z * spread / claim) ** 2))
    return Power(what, claim, spread, assumption, needed, there, z * spread / math.sqrt(there))


def score_spread(base: float, claim: float) -> float:
    """Standard deviation of a paired change of scores in 0 to 1 from mean `base` by `claim`, at most: that of two
    answers that know nothing of each other, each 0 or 1."""
    after = min(base + claim, 1.0)
    return math.sqrt(max(base * (1 - base) + after * (1 - after), 0.01))
