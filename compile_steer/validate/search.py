"""Find a coefficient by a solver and a layer by successive halving, in place of a whole grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

MAX_EVALUATIONS = 8
TOLERANCE = 0.02  # of the coefficient, relative
_LIMIT = math.log(64.0)
_STEP = math.log(6.0)
_FLOOR = 1e-3


@dataclass(frozen=True)
class Solved:
    """The coefficient found, or None where none from 1/64 to 64 reaches the target; and what was evaluated."""

    coefficient: float | None
    evaluations: dict[float, float]


def solve(
    value: Callable[[float], float], target: float, *, below: bool, start: float = 1.0, budget: int = MAX_EVALUATIONS
) -> Solved:
    """Find c > 0 with value(c) = target to within `TOLERANCE`, for a value that grows about as c^2.

    In logarithms that is nearly a line of slope 2, so a few steps bracket the root and Brent's method ends it.

    Args:
        value: what grows with the coefficient: a divergence, or the log of a perplexity ratio.
        below: return the largest coefficient evaluated whose value is at most the target; else the nearest.
    """
    seen: dict[float, float] = {}

    def gap(x: float) -> float:
        if x not in seen:
            seen[x] = math.log(max(value(math.exp(x)) / target, _FLOOR))
        return seen[x]

    bracket = _bracket(gap, math.log(start), budget)
    found = None
    if bracket is not None:
        left = budget - len(seen)
        if left > 0 and bracket[0] < bracket[1]:
            brentq(gap, *bracket, xtol=TOLERANCE / 2, maxiter=left, disp=False)
        kept = [x for x, g in seen.items() if g <= 0] if below else list(seen)
        found = math.exp(max(kept) if below else min(kept, key=lambda x: abs(seen[x])))
    return Solved(found, {math.exp(x): math.exp(g) * target for x, g in sorted(seen.items())})


def _bracket(gap: Callable[[float], float], x: float, budget: int) -> tuple[float, float] | None:
    """(low, high) with gap(low) <= 0 <= gap(high); equal where `x` is near enough; None at the limits."""
    now = gap(x)
    for _ in range(budget - 1):
        if -TOLERANCE <= now <= 0:
            return x, x
        # The line of slope 2, and a little beyond, so that the root lies between.
        step = float(np.clip(-1.2 * now / 2, -_STEP, _STEP))
        step += math.copysign(2 * TOLERANCE, step)
        after = float(np.clip(x + step, -_LIMIT, _LIMIT))
        if after == x:
            return None
        then = gap(after)
        if (now <= 0) != (then <= 0):
            return (x, after) if now <= 0 else (after, x)
        x, now = after, then
    return None


def climb(holds: Callable[[float], bool], ordered: Sequence[float], near: float) -> float | None:
    """The last of `ordered` that holds, begun at the one nearest to `near`; None where the first does not.

    What holds for one holds for those before it, so few are asked where `near` is about right.
    """
    at = min(range(len(ordered)), key=lambda n: abs(ordered[n] - near))
    if holds(ordered[at]):
        while at + 1 < len(ordered) and holds(ordered[at + 1]):
            at += 1
        return ordered[at]
    return next((one for one in reversed(ordered[:at]) if holds(one)), None)


@dataclass(frozen=True)
class Rung:
    """One rung of the search: on so many pairs, each layer's margin at its largest coherent coefficient."""

    pairs: int
    margins: dict[int, float]


def halve(
    layers: Sequence[int],
    pairs: int,
    most_pairs: int,
    keep: int,
    measure: Callable[[int, Sequence[int]], dict[int, float]],
) -> tuple[list[int], list[Rung]]:
    """Successive halving (Jamieson and Talwalkar 1502.07943): few pairs for all layers, the better half kept and
    the pairs doubled, until `keep` layers are left; returns them and every rung.

    Args:
        measure: (number of pairs, layers) -> the contrast of each.
    """
    left, rungs = list(layers), []
    while len(left) > keep:
        margins = measure(min(pairs, most_pairs), left)
        rungs.append(Rung(min(pairs, most_pairs), margins))
        half = max(keep, math.ceil(len(left) / 2))
        left = sorted(sorted(left, key=lambda layer: -margins[layer])[:half])
        pairs *= 2
    return left, rungs
