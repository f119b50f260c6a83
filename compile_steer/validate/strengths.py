"""SweepPoint-response: what the dial does at the chosen layer, up to and past the wall where the text falls apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from compile_steer.steering.program import Program
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.report import CoefficientSweep, SweepPoint

MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
# Once the perplexity ratio's logarithm is beyond the ceiling's by this factor, larger doses show nothing more.
_FAR = 2.0


@dataclass(frozen=True)
class Dosed:
    """A dose before its answers: the coefficient, what runs, mean contrast and perplexity ratio."""

    coefficient: float
    program: Program
    contrast: float
    perplexity_ratio: float


def dose_response(bench: Bench, program: Program, coefficient: float, ceiling: float) -> list[Dosed]:
    """The chosen program at multiples of its coefficient, both signs, each up to the first that is far too much."""
    bench.advance(program)
    found = []
    for sign in (-1.0, 1.0):
        for multiple in MULTIPLES:
            under = program.scaled(sign * multiple)
            ratio = bench.perplexity_ratio(under)
            found.append((sign * multiple, under, ratio))
            if math.log(ratio) > _FAR * math.log(ceiling):
                break
    effects = bench.effects([under for _multiple, under, _ratio in found]).mean(axis=1)
    doses = [
        Dosed(multiple * coefficient, under, float(effect), ratio)
        for (multiple, under, ratio), effect in zip(found, effects, strict=True)
    ]
    return sorted(doses, key=lambda dose: dose.coefficient)


def response(
    doses: Sequence[Dosed],
    scores: Sequence[float],
    repetition: Sequence[float],
    base: tuple[float, float],
    ceiling: float,
) -> CoefficientSweep:
    """Doses with their scores, the base at 0 among them, and the walls.

    Args:
        base: the base's own score and repetition on the same prompts.
    """
    found = [
        SweepPoint(one.coefficient, one.contrast, one.perplexity_ratio, score, repeats)
        for one, score, repeats in zip(doses, scores, repetition, strict=True)
    ]
    found = sorted([*found, SweepPoint(0.0, 0.0, 1.0, *base)], key=lambda dose: dose.coefficient)
    return CoefficientSweep(found, ceiling, _wall(found, 1.0, ceiling), _wall(found, -1.0, ceiling))


def _wall(doses: Sequence[SweepPoint], sign: float, ceiling: float) -> float | None:
    """The coefficient of that sign where log perplexity ratio first crosses the ceiling's, by linear interpolation."""
    side = sorted((d for d in doses if d.coefficient * sign >= 0), key=lambda d: abs(d.coefficient))
    for low, high in pairwise(side):
        if high.perplexity_ratio > ceiling:
            logs = [math.log(low.perplexity_ratio), math.log(high.perplexity_ratio)]
            return float(np.interp(math.log(ceiling), logs, [low.coefficient, high.coefficient]))
    return None
