"""What the equivalence tests can be expected to show, from the reference alone: before any artifact is seen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from compile_steer.stats import LEVEL, PowerAnalysis, power_analysis
from compile_steer.verification.sampled_score import looks

if TYPE_CHECKING:
    from compile_steer.verification.reference import Reference

# Of log weights: beyond it no number of answers that anybody would take suffices.
_LARGEST_VARIANCE = 10.0


def planned_tests(reference: Reference) -> list[PowerAnalysis]:
    """What each test can be expected to show with the prompts that there are, and how many it needs."""
    effects, allowed = reference.margins.steered - reference.margins.base, reference.options.gates.kl_remaining
    plans = []
    for measure, margin in reference.equivalence_margins.items():
        level, samples = LEVEL, 1
        if measure != "score":
            values, left = effects, math.sqrt(allowed)  # KL grows with the square of the error
            spread = left * float(np.sqrt(np.square(values).mean()))
            assumed = f"assuming {left:.0%} of the effect's size left over, as a remaining KL of {allowed:.0%} allows"
        elif reference.sampled_scores is None:
            values = reference.answers.steered.scores
            spread = math.sqrt(2) * float(values.std(ddof=1))  # of a difference: two variances add up
            assumed = "assuming that answers of compiled and steered model are independent"
        else:
            values, samples = reference.sampled_scores.scores, reference.options.samples_per_prompt
            # Log weights are sums over many tokens, so about normal; with a mean of -KL their variance is twice the KL.
            kl = allowed * float(reference.kl_base.kl.sum()) / len(reference.heldout)
            spread = float(values.std(ddof=1)) * math.sqrt(math.expm1(min(2 * kl, _LARGEST_VARIANCE)) / samples)
            assumed = f"{samples} sampled answers to each, assuming weights that spread as a remaining KL of {allowed:.0%} allows"
            *_looks, (_rounds, level) = looks(samples)
        plan = power_analysis("equivalence", measure, margin, spread, len(values), assumed, level)
        if spread == 0 and samples > 1:  # scores that are all alike: it is the number of answers that counts
            plan = replace(plan, needed=max(2, math.ceil(plan.needed / samples)))
        plans.append(plan)
    return plans
