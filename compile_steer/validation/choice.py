"""Which grid point of the sweep is tested: the cheapest that reaches the effect; and which one would cost less."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compile_steer.common.errors import RecipeError
from compile_steer.common.figures import decisive
from compile_steer.stats import LEVEL
from compile_steer.validation.options import ValidateOptions, repetition_limit
from compile_steer.validation.report import GridPoint, ValidationReport, block_name


def cost_of(point: GridPoint, options: ValidateOptions, base_repetition: float) -> float:
    """The largest part of any limit that the point uses up: perplexity, repetition, likelihood of right answers."""
    parts = [(point.repetition or 0.0) / repetition_limit(options, base_repetition)]
    parts.append((point.lost_answers or 0.0) / options.tolerances.right_answers)
    if point.perplexity_ratio is not None:
        parts.append(math.log(point.perplexity_ratio) / math.log(options.max_perplexity_ratio))
    return max(parts)


def choose(
    grid: Sequence[GridPoint], options: ValidateOptions, base_score: float, repetition: float, n_prompts: int
) -> GridPoint:
    """Return the cheapest point within the limits whose score is within one standard error of the best one's.

    That is the one-standard-error rule (Breiman et al. 1984, section 3.4.3). Where none scores more than the base, it is the
    point with the largest margin; where none keeps its right answers, the one that loses the fewest.

    Args:
        repetition: of the base's answers; `base_score` is theirs too.
        n_prompts: how many prompts the scores are means over.

    Raises:
        RecipeError: no point is coherent.
    """
    limit = repetition_limit(options, repetition)

    def cost(point: GridPoint) -> float:
        return cost_of(point, options, repetition)

    # Only points that were answered have one.
    coherent = [p for p in grid if p.repetition is not None and p.repetition <= limit]
    if not coherent:
        raise RecipeError(_none_coherent(grid, options, limit))
    within = [point for point in coherent if cost(point) <= 1]
    if not within:
        return min(coherent, key=cost)
    best = max(within, key=lambda point: (point.score or 0.0, point.margin or 0.0))
    score = best.score or 0.0
    if score > base_score:
        # The largest that the standard error of a mean of values in 0 to 1 can be.
        least = score - math.sqrt(score * (1 - score) / n_prompts)
        reach = [p for p in within if (p.score or 0.0) >= least and (p.score or 0.0) > base_score]
        best = min((p for p in reach if p is best or (p.p_value or 1.0) <= LEVEL), key=cost)
    return best


def cheaper_advice(report: ValidationReport) -> str:
    """Return the best point of the sweep that costs less; without one, what the tolerances would have to be."""
    answered = [point for point in report.grid if point.score is not None and point.cost is not None]
    costs = [p.cost or 0.0 for p in answered if (p.layer, p.coefficient) == (report.layer, report.coefficient)]
    cheaper = [p for p in answered if (p.cost or 0.0) < min([1.0, *costs]) and (p.score or 0.0) > report.scores.base]
    if cheaper:
        best = max(cheaper, key=lambda point: point.score or 0.0)
        return (
            f"use block {block_name(best.layer)}, coefficient {best.coefficient:.3g}, which uses {best.cost:.0%} of what the "
            f"limits allow and scores {best.score:.2f} on validation prompts"
        )
    nearest = min(answered, key=lambda point: point.cost or 0.0, default=None)
    none = "no cheaper point of the sweep scores more than the base"
    if nearest and (nearest.cost or 0.0) > 1:
        none = (
            f"no point of the sweep is within the limits, the nearest is block {block_name(nearest.layer)}, coefficient "
            f"{nearest.coefficient:.3g}, at {nearest.cost:.0%} of them"
        )
    wider = {e.key: min(1.0, math.ceil(100 * e.lost.value - 1e-9) / 100) for e in report.side_effects if e.violated}
    allowed = ", ".join(f"validate.tolerances.{key}: {value:g}" for key, value in wider.items())
    return f"{none}; if the behaviour is worth it, allow it in the recipe ({allowed})"


def _none_coherent(grid: Sequence[GridPoint], options: ValidateOptions, limit: float) -> str:
    mildest = min(grid, key=lambda point: point.perplexity_ratio or math.inf)
    where = f"layer {block_name(mildest.layer)}"
    if mildest.perplexity_ratio is None:
        return f"validate: no layer has a usable coefficient: {mildest.skipped} ({where})."
    ratio = decisive(mildest.perplexity_ratio, options.max_perplexity_ratio, ".2f")[0]
    repeats = (
        "was not answered" if mildest.repetition is None else f"repeats {decisive(mildest.repetition, limit, '.2f')[0]}"
    )
    return (
        f"validate: no point of the sweep is coherent. The mildest ({where}, coefficient {mildest.coefficient:g}) multiplies "
        f"the perplexity of control text by {ratio} and {repeats}; allowed are {options.max_perplexity_ratio:g} and "
        f"{limit:.3g}. Try smaller coefficients."
    )
