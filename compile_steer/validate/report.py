"""What validation found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import load_json, save_record, sha256, was_edited
from compile_steer.artifacts.provenance import Provenance
from compile_steer.stats import Interval, PowerAnalysis
from compile_steer.steering.directions import EVERY_BLOCK, FROM_LABELS
from compile_steer.validate.search import Rung

Verdict = Literal["pass", "fail", "inconclusive"]


def block_name(layer: int) -> str:
    """A layer as a person reads it."""
    return "every block" if layer == EVERY_BLOCK else str(layer)


@dataclass(frozen=True)
class GridPoint:
    """One layer and coefficient of the sweep, on validation data.

    `margin` is the mean change of (log p(positive) - log p(negative)), nats a token, with its one-sided sign-flip
    p-value and Benjamini-Hochberg q-value over the sweep; `score` and `repetition` are None where the cell was not
    answered in full, and what was not measured at all is `skipped`, with the reason. `evaluations` is how many a
    solver took to find the coefficient.
    """

    layer: int
    coefficient: float
    margin: float | None = None
    perplexity_ratio: float | None = None
    p_value: float | None = None
    q_value: float | None = None
    score: float | None = None
    repetition: float | None = None
    evaluations: int | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Controls:
    """Effects of other directions at the same dose, on the same test pairs as `effect`.

    `p_value` is the effect's rank among the random directions'; `p_random` and `p_shuffled` are how likely one more
    such direction has an effect as large (see `stats.outlier_p`). `other_behaviour` is another behaviour's direction.
    `shuffled_kind` is what the directions of `shuffled` are made from, in words.
    """

    effect: float
    random: list[float]
    shuffled: list[float]
    opposite: float
    other_behaviour: float | None
    p_value: float
    p_random: float
    p_shuffled: float | None
    shuffled_kind: str = FROM_LABELS


@dataclass(frozen=True)
class Separability:
    """How well the direction tells held-out pairs apart (Braun et al. 2505.22637)."""

    auroc: float
    d_prime: float
    mean_cosine: float


@dataclass(frozen=True)
class Scores:
    """Mean generation score of test prompts: base, steered, under random directions (another one a prompt) at the
    same dose, asked for in the prompt, shown by examples; and paired differences with 95 % intervals.

    `effect` is steered less base, with its one-sided sign-flip p-value.
    """

    base: float
    steered: float
    random: float
    instructed: float | None
    few_shot: float | None
    effect: Interval
    p_value: float
    over_random: Interval
    p_over_random: float
    over_instructed: Interval | None
    over_few_shot: Interval | None


@dataclass(frozen=True)
class Coherence:
    """What steering costs: neutral perplexity over the base's, repeated 3-grams, answers that ended by themselves,
    and the mean displacement (||c v|| of an add) over the median norm of the stream, the largest of all sites."""

    perplexity_ratio: float
    repetition_base: float
    repetition_steered: float
    ended_base: float
    ended_steered: float
    strength: float


@dataclass(frozen=True)
class SweepPoint:
    """The chosen layer at another coefficient, on test pairs, neutral texts and test prompts."""

    coefficient: float
    margin: float
    perplexity_ratio: float
    score: float
    repetition: float


@dataclass(frozen=True)
class CoefficientSweep:
    """The chosen layer at several coefficients, in ascending order.

    `crossing` and `negative_crossing` are the coefficients where the perplexity ratio crosses `perplexity_limit`; None
    where it does not.
    """

    points: list[SweepPoint]
    perplexity_limit: float
    crossing: float | None
    negative_crossing: float | None


@dataclass(frozen=True)
class ValidationReport:
    """Everything measured on validation (the sweep) and once on test (the rest)."""

    kind: Literal["validation report"] = field(default="validation report", kw_only=True)
    name: str
    layer: int
    coefficient: float
    grid: list[GridPoint]
    layer_search: list[Rung]
    power: list[PowerAnalysis]
    margin: Interval
    p_margin: float
    scores: Scores
    controls: Controls
    separability: Separability
    steerability: float
    wrong_way: float
    coherence: Coherence
    coefficient_sweep: CoefficientSweep
    samples: dict[str, str]
    program_hash: str
    inputs: str
    n_pairs: int
    n_prompts: int
    verdict: Verdict = "inconclusive"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The chosen layer as a person reads it."""
        return block_name(self.layer)

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ValidationReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, ValidationReport, "validation report", "validate")


def own_validation(origin: Provenance, path: Path) -> ValidationReport | None:
    """The report at `path`, if it is the one that the artifact was compiled by and nobody edited it."""
    whole = path.is_file() and sha256(path) == origin.validation_sha256 and not was_edited(path)
    return ValidationReport.load(path) if whole else None
