"""What validation found, and the verdict with its reasons."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compile_steer.errors import ArtifactError
from compile_steer.files import save_json
from compile_steer.metrics import Interval
from compile_steer.settings import Validate

Verdict = Literal["pass", "fail", "inconclusive"]
_SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Cell:
    """One layer and coefficient of the sweep, on validation data.

    `contrast` is the mean change of (log p(positive) - log p(negative)), nats a token; `score` and
    `repetition` are None where the cell was not answered in full.
    """

    layer: int
    coefficient: float
    contrast: float
    perplexity_ratio: float
    score: float | None = None
    repetition: float | None = None


@dataclass(frozen=True)
class Controls:
    """Effects of other directions of the same length, on the same test pairs as `effect`."""

    effect: float
    random: list[float]
    shuffled: list[float]
    opposite: float
    p_value: float

    @staticmethod
    def of(effect: float, random: list[float], shuffled: list[float], opposite: float) -> Controls:
        """The p-value is a permutation test's: the rank of the effect among the random directions'."""
        exceed = sum(other >= effect for other in random)
        return Controls(effect, random, shuffled, opposite, (1 + exceed) / (1 + len(random)))


@dataclass(frozen=True)
class Separability:
    """How well the direction tells held-out pairs apart (Braun et al. 2505.22637)."""

    auroc: float
    d_prime: float
    mean_cosine: float


@dataclass(frozen=True)
class Scores:
    """Mean generation score of test prompts: base, steered, asked for in the prompt; and the paired change."""

    base: float
    steered: float
    instructed: float | None
    effect: Interval


@dataclass(frozen=True)
class Coherence:
    """What steering costs: neutral perplexity over the base's, repeated 3-grams, answers that ended by
    themselves, and ||c v|| over the median norm of the stream."""

    perplexity_ratio: float
    repetition_base: float
    repetition_steered: float
    ended_base: float
    ended_steered: float
    relative_dose: float


@dataclass(frozen=True)
class ValidationReport:
    """Everything measured on validation (the sweep) and once on test (the rest)."""

    name: str
    layer: int
    coefficient: float
    sweep: list[Cell]
    contrast: Interval
    scores: Scores
    controls: Controls
    separability: Separability
    steerability: float
    wrong_way: float
    coherence: Coherence
    samples: dict[str, str]
    program_hash: str
    inputs: str
    n_pairs: int
    n_prompts: int
    verdict: Verdict = "inconclusive"
    reasons: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        save_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ValidationReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return ValidationReport(
                **{
                    **content,
                    "sweep": [Cell(**cell) for cell in content["sweep"]],
                    "contrast": Interval(**content["contrast"]),
                    "scores": Scores(**{**content["scores"], "effect": Interval(**content["scores"]["effect"])}),
                    "coherence": Coherence(**content["coherence"]),
                    "controls": Controls(**content["controls"]),
                    "separability": Separability(**content["separability"]),
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a validation report ({error}). Make it with 'compile-steer validate'."
            ) from error


def judge(report: ValidationReport, options: Validate) -> tuple[Verdict, list[str]]:
    """The verdict and every reason for it; a reason against it comes before those for it."""
    failures = _failures(report, options)
    doubts = _doubts(report)
    if failures:
        return "fail", failures + doubts
    if doubts:
        return "inconclusive", doubts
    c = report.controls
    return "pass", [
        f"on {report.n_pairs} test pairs steering moves log p(positive) - log p(negative) by {report.contrast} nats a token",
        f"{len(c.random)} random directions of the same norm move it by at most {max(c.random):.3f} (p = {c.p_value:.3f}), "
        f"{len(c.shuffled)} from shuffled labels by at most {max(c.shuffled):.3f}, the opposite sign by {c.opposite:.3f}",
        f"on {report.n_prompts} test prompts the score goes from {report.scores.base:.2f} to {report.scores.steered:.2f} "
        f"(change {report.scores.effect})",
        f"neutral perplexity x{report.coherence.perplexity_ratio:.2f}, repetition {report.coherence.repetition_steered:.2f}",
    ]


def _failures(report: ValidationReport, options: Validate) -> list[str]:
    c = report.controls
    found = []
    if report.contrast.high <= 0:
        found.append(f"the direction moves the pairs the wrong way: {report.contrast} nats a token")
    if c.p_value > _SIGNIFICANCE:
        found.append(
            f"a random direction of the same norm moves the score as much: effect {c.effect:.3f}, random up to "
            f"{max(c.random):.3f} (p = {c.p_value:.3f}); try other layers, more pairs, or another read-out"
        )
    if c.effect <= max(c.shuffled):
        found.append(
            f"directions from shuffled labels do as well ({max(c.shuffled):.3f} against {c.effect:.3f}): "
            "the pairs do not carry the behaviour"
        )
    if report.coherence.perplexity_ratio > options.max_perplexity_ratio:
        found.append(
            f"neutral text becomes {report.coherence.perplexity_ratio:.2f}x as perplexing (at most {options.max_perplexity_ratio:g}): "
            "use a smaller coefficient"
        )
    if report.coherence.repetition_steered > max(options.max_repetition, report.coherence.repetition_base):
        found.append(
            f"the steered model repeats itself: {report.coherence.repetition_steered:.2f} of its 3-grams (base "
            f"{report.coherence.repetition_base:.2f}, at most {options.max_repetition:g}); use a smaller coefficient"
        )
    if report.scores.steered < options.min_score:
        found.append(f"the score on test prompts is {report.scores.steered:.2f}, below {options.min_score:g}")
    return found


def _doubts(report: ValidationReport) -> list[str]:
    found = []
    if report.contrast.low <= 0 < report.contrast.high:
        found.append(
            f"the interval of the effect holds 0 on {report.n_pairs} pairs: {report.contrast} nats a token; add test pairs"
        )
    if report.scores.effect.low <= 0:
        found.append(
            f"the answers themselves do not change for certain: score {report.scores.base:.2f} to "
            f"{report.scores.steered:.2f} ({report.scores.effect}) on {report.n_prompts} prompts; add prompts or coefficient"
        )
    if report.controls.opposite >= 0:
        found.append(
            f"the opposite sign moves the pairs the same way ({report.controls.opposite:.3f}): not one direction"
        )
    return found
