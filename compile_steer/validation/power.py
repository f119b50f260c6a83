"""How many pairs and prompts a claim takes, before anything is measured."""

from __future__ import annotations

import math

from compile_steer.stats import PowerAnalysis, power_analysis


def score_power(base: float, effect: float, available: int) -> PowerAnalysis:
    """Plan the test of a change of the mean score by `effect` from the base's, on `available` prompts.

    It assumes the largest spread that a paired change of scores of 0 to 1 can have: two independent answers, each 0 or 1.
    """
    after = min(base + effect, 1.0)
    spread = math.sqrt(max(base * (1 - base) + after * (1 - after), 0.01))
    assumption = f"from the base's {base:.2f}, with the largest spread that a paired change can have"
    return power_analysis("difference", "score", effect, spread, available, assumption)


def margin_power(effect: float, spread: float, available: int) -> PowerAnalysis:
    """Plan the test of a change of the log-likelihood margin by `effect`, where the base's margins [nats/token] spread so."""
    assumption = "assuming that the pairs' effects spread as much as their margins in the base"
    return power_analysis("difference", "log-likelihood margin", effect, spread, available, assumption)
