"""Equivalence, not only closeness: two one-sided tests of compiled against steered, prompt by prompt.

That a difference was not found shows nothing; that it is smaller than a margin is what has to be found (Schuirmann
1987: the 90 % interval of the paired difference lies inside the margin).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import nct, norm, t, ttest_1samp

Measure = Literal["contrast", "score", "score by kind", "capability"]
_COUNTED: frozenset[Measure] = frozenset({"score", "score by kind", "capability"})  # 0 or 1 a sample, mostly
LEVEL = 0.05
# Where the samples suffice the test is a gate, so an artifact without any difference fails it by chance once in twenty.
POWER = 0.95
_UNITS: dict[Measure, tuple[str, str]] = {
    "contrast": (" nats/token", "pairs"),
    "score": ("", "prompts"),
    "score by kind": ("", "prompts"),
    "capability": ("", "questions"),
}


@dataclass(frozen=True)
class Planned:
    """What is expected before any artifact is seen: `needed` of the `there` samples would show `margin`.

    `spread` is the assumed standard deviation of the paired difference, `assumption` says where it is from.
    """

    what: Measure
    margin: float
    spread: float
    assumption: str
    needed: int
    there: int

    def __str__(self) -> str:
        unit, samples = _UNITS[self.what]
        enough = "enough" if self.there >= self.needed else "too few"
        return (
            f"{self.what}: equivalence within {self.margin:.3g}{unit} needs {self.needed:,} test {samples} for {POWER:.0%} "
            f"power; there are {self.there}, {enough} ({self.assumption})"
        )


@dataclass(frozen=True)
class Equivalence:
    """TOST of `n` paired differences, compiled - steered, against +-`margin` (nats a token, or points of a score).

    `low` and `high` are the 90 % interval of the mean `difference`, `p` the larger p-value of the two tests, `spread`
    the standard deviation, from which `needed` is the number that shows the margin with 95 % power if there is no
    difference.
    """

    what: Measure
    margin: float
    difference: float
    low: float
    high: float
    p: float
    spread: float
    n: int
    needed: int
    equivalent: bool

    @property
    def enough(self) -> bool:
        """True if so many samples could have shown the margin."""
        return self.n >= self.needed

    def __str__(self) -> str:
        unit, samples = _UNITS[self.what]
        shown = "equivalent" if self.equivalent else "not equivalent"
        beyond = self.low >= self.margin or self.high <= -self.margin
        if not self.equivalent and not self.enough and not beyond:
            shown = f"not shown: needs {self.needed:,} {samples}, there are {self.n}"
        return f"{self.what} {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] of +-{self.margin:.3g}{unit}, {shown}"


def needed(spread: float, margin: float, *, counted: bool = False) -> int:
    """The least number of paired differences with which TOST shows `margin` at 5 % with 95 % power, if there is none.

    The power of both tests at once is at least 2 P(T > t) - 1, T noncentral t: exact but for the part where both fail.

    Args:
        spread: standard deviation of a difference.
        counted: a difference is a whole point or none. Where none was seen (`spread` 0) it takes as many as would have shown one
            with 95 %, if they were a share `margin` of all: (1 - margin)^n below 5 %.

    Raises:
        ValueError: a margin that is not above 0, or a spread that is negative or not finite.
    """
    if not (margin > 0 and math.isfinite(margin)) or not (spread >= 0 and math.isfinite(spread)):
        raise ValueError(
            f"found margin {margin} and spread {spread}; needed: a margin above 0, a spread of at least 0."
        )
    if spread == 0 and counted and margin < 1:
        return max(2, math.ceil(math.log(LEVEL) / math.log1p(-margin)))
    z = float(norm.ppf(1 - LEVEL) + norm.ppf((1 + POWER) / 2))
    count = max(2, math.ceil((z * spread / margin) ** 2))
    while _power(count, spread, margin) < POWER:
        count += 1
    return count


def _power(count: int, spread: float, margin: float) -> float:
    if spread == 0:
        return 1.0
    shift = margin * math.sqrt(count) / spread
    return 2 * float(nct.sf(t.ppf(1 - LEVEL, count - 1), count - 1, shift)) - 1


def planned(what: Measure, margin: float, spread: float, there: int, assumption: str) -> Planned:
    """What `there` samples can be expected to show; raises `ValueError` as `needed` does."""
    return Planned(what, margin, spread, assumption, needed(spread, margin, counted=what in _COUNTED), there)


def equivalence(what: Measure, differences: np.ndarray, margin: float) -> Equivalence:
    """Test paired differences [n] against +-`margin`, both in nats a token or points.

    Raises:
        ValueError: fewer than two differences, one that is not finite, or a margin that is not above 0.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError(f"found {len(differences)} differences, {differences}; needed: two or more, all finite.")
    mean = float(differences.mean())
    spread = 0.0 if np.ptp(differences) == 0 else float(differences.std(ddof=1))
    if spread == 0:  # no interval to speak of, and no t: the differences are all the same
        unseen = (1 - min(margin, 1.0)) ** len(differences) if what in _COUNTED else 0.0
        low, high, p = mean, mean, unseen if abs(mean) < margin else 1.0
    else:
        bounds = ttest_1samp(differences, 0.0).confidence_interval(1 - 2 * LEVEL)
        low, high = float(bounds.low), float(bounds.high)
        above = ttest_1samp(differences, -margin, alternative="greater").pvalue
        below = ttest_1samp(differences, margin, alternative="less").pvalue
        p = float(max(above, below))
    count = needed(spread, margin, counted=what in _COUNTED)
    return Equivalence(what, margin, mean, low, high, p, spread, len(differences), count, p < LEVEL)
