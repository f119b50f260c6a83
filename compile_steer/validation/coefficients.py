"""Find the coefficient of a layer, and measure the chosen program at other coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from compile_steer.steering.program import Program
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.report import CoefficientSweep, SweepPoint

TOLERANCE = 0.02  # of the coefficient, relative
_BUDGET = 8  # evaluations of the solver for one layer: each is a pass over all control texts
_MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def solve(
    value: Callable[[float], float], target: float, *, below: bool, start: float = 1.0
) -> tuple[float | None, list[float]]:
    """Find c > 0 with value(c) = target to within `TOLERANCE`, for a value that grows about as c^2.

    Args:
        value: grows with the coefficient: a divergence, or the log of a perplexity ratio.
        below: return the largest coefficient evaluated whose value is at most the target; otherwise the nearest.

    Returns:
        The coefficient, or None if none from 1/64 to 64 reaches the target; and those evaluated, in ascending order.
    """
    from scipy.optimize import brentq

    seen: dict[float, float] = {}

    def gap(x: float) -> float:
        """Return log(value / target) at the coefficient e^x: nearly a line of slope 2."""
        if x not in seen:
            seen[x] = math.log(max(value(math.exp(x)) / target, 1e-3))  # a value may be 0 or below near c = 0
        return seen[x]

    # Step along the line of slope 2 until the gap changes its sign.
    bracket, x = None, math.log(start)
    now = gap(x)
    for _ in range(_BUDGET - 1):
        if -TOLERANCE <= now <= 0:
            bracket = x, x
            break
        # A step 20 % and a bit too long, so that the root lies between; at most by a factor of 6, as a model may break.
        step = float(np.clip(-1.2 * now / 2, -math.log(6), math.log(6)))
        step += math.copysign(2 * TOLERANCE, step)
        after = float(np.clip(x + step, -math.log(64), math.log(64)))
        if after == x:
            break
        then = gap(after)
        if (now <= 0) != (then <= 0):
            bracket = (x, after) if now <= 0 else (after, x)
            break
        x, now = after, then

    coefficient = None
    if bracket is not None:
        # Brent's method between the two, with what is left of the budget.
        left = _BUDGET - len(seen)
        if left > 0 and bracket[0] < bracket[1]:
            brentq(gap, *bracket, xtol=TOLERANCE / 2, maxiter=left, disp=False)
        best = max(x for x, g in seen.items() if g <= 0) if below else min(seen, key=lambda x: abs(seen[x]))
        coefficient = math.exp(best)
    return coefficient, [math.exp(x) for x in sorted(seen)]


def climb(holds: Callable[[float], bool], ordered: Sequence[float], near: float) -> float | None:
    """Return the last of `ordered` that holds, or None if the first does not.

    What holds for one value holds for those before it, so starting from the value nearest to `near` needs few evaluations.
    """
    at = min(range(len(ordered)), key=lambda n: abs(ordered[n] - near))
    if holds(ordered[at]):
        while at + 1 < len(ordered) and holds(ordered[at + 1]):
            at += 1
        return ordered[at]
    return next((value for value in reversed(ordered[:at]) if holds(value)), None)


def sweep_coefficients(
    evaluator: ContrastEvaluator, program: Program, coefficient: float, limit: float
) -> list[tuple[Program, SweepPoint]]:
    """Measure `program` at multiples of its `coefficient`, of both signs; the scores are not known yet.

    Args:
        limit: perplexity ratio; each sign stops at the first point whose log ratio is twice the limit's, where the text has
            fallen apart and larger coefficients show nothing more.
    """
    evaluator.advance(program)
    measured = []
    for sign in (-1.0, 1.0):
        for multiple in _MULTIPLES:
            scaled = program.scaled(sign * multiple)
            ratio = evaluator.perplexity_ratio(scaled)
            measured.append((sign * multiple, scaled, ratio))
            if math.log(ratio) > 2.0 * math.log(limit):
                break
    effects = evaluator.effects([scaled for _multiple, scaled, _ratio in measured]).mean(axis=1)
    points = [
        (scaled, SweepPoint(multiple * coefficient, float(effect), ratio, math.nan, math.nan))
        for (multiple, scaled, ratio), effect in zip(measured, effects, strict=True)
    ]
    return sorted(points, key=lambda point: point[1].coefficient)


def coefficient_sweep(points: Sequence[SweepPoint], limit: float) -> CoefficientSweep:
    """Sort the points, and interpolate where the log perplexity ratio first crosses the limit's on either side of 0."""

    def crossing(sign: float) -> float | None:
        side = sorted((p for p in points if p.coefficient * sign >= 0), key=lambda p: abs(p.coefficient))
        for low, high in pairwise(side):
            if high.perplexity_ratio > limit:
                logs = [math.log(low.perplexity_ratio), math.log(high.perplexity_ratio)]
                return float(np.interp(math.log(limit), logs, [low.coefficient, high.coefficient]))
        return None

    in_order = sorted(points, key=lambda point: point.coefficient)
    return CoefficientSweep(in_order, limit, crossing(1.0), crossing(-1.0))
