"""The validation report: everything that was measured on validation data (the sweep) and once on test data (the rest)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import load_json, save_record, sha256, was_edited
from compile_steer.artifacts.provenance import Provenance
from compile_steer.stats import Interval, PowerAnalysis
from compile_steer.steering.directions import EVERY_BLOCK, FROM_LABELS

Verdict = Literal["pass", "fail", "inconclusive"]


def block_name(layer: int) -> str:
    """A layer in words."""
    return "every block" if layer == EVERY_BLOCK else str(layer)


@dataclass(frozen=True)
class GridPoint:
    """One layer and coefficient of the sweep, on validation data.

    Attributes:
        margin: mean change of the log-likelihood margin, in nats per token.
        perplexity_ratio: perplexity of control text over the base's.
        p_value, q_value: one-sided sign-flip p-value of the margin, and Benjamini-Hochberg q-value over the sweep.
        score, repetition: of the answers; None if none were generated at this point.
        evaluations: how many a solver needed to find the coefficient.
        skipped: why the point was not measured.
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
class Rung:
    """One round of the search over layers: each layer's margin at its largest coherent coefficient, on `pairs` pairs."""

    pairs: int
    margins: dict[int, float]


@dataclass(frozen=True)
class Controls:
    """Effects of other directions of the same strength, on the same test pairs as `effect`, in nats per token.

    Attributes:
        opposite: of the program with the opposite sign.
        other_behaviour: of another behaviour's direction.
        p_value: rank of the effect among the random directions'.
        p_random, p_shuffled: how likely one more such direction has an effect as large (see `stats.outlier_p`).
        shuffled_kind: what the `shuffled` directions are made from, in words.
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
    """How well the direction separates held-out pairs (Braun et al. 2505.22637)."""

    auroc: float
    d_prime: float
    mean_cosine: float


@dataclass(frozen=True)
class Scores:
    """Mean generation scores on test prompts under each condition, and paired differences with 95 % intervals.

    Attributes:
        random: under random directions of the same strength, another one for each prompt.
        instructed, few_shot: of the base, with a request or with examples in the prompt.
        effect: steered minus base, with the one-sided sign-flip p-value `p_value`.
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
    """What steering costs.

    Attributes:
        perplexity_ratio: perplexity of control text over the base's.
        repetition_base, repetition_steered: fraction of the answers' 3-grams that occurred before.
        ended_base, ended_steered: fraction of the answers that ended by themselves.
        strength: mean displacement (||c v|| of an addition) over the median norm of the stream, the largest of all sites.
    """

    perplexity_ratio: float
    repetition_base: float
    repetition_steered: float
    ended_base: float
    ended_steered: float
    strength: float


@dataclass(frozen=True)
class SweepPoint:
    """The chosen layer at another coefficient, on test pairs, control texts and test prompts."""

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
    """What was measured, the verdict and its reasons.

    Attributes:
        margin: change of the log-likelihood margin on test pairs, nats per token, with its sign-flip p-value `p_margin`.
        steerability: mean slope of a pair's effect over the coefficient; `wrong_way` is the fraction with a negative one.
        samples: answers to the recipe's own question: base, steered, and at a coefficient that is too high.
        program_hash, inputs: SHA-256 of the program's file, and fingerprint of what the report depends on.
    """

    # A keyword, so that it may come first in the JSON although it has a default.
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
    n_pairs: int
    n_prompts: int
    program_hash: str = ""
    inputs: str = ""
    verdict: Verdict = "inconclusive"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The chosen layer in words."""
        return block_name(self.layer)

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ValidationReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, ValidationReport, "validation report", "validate")


def own_validation(origin: Provenance, path: Path) -> ValidationReport | None:
    """Return the report at `path` if the artifact was compiled by it and nobody edited it."""
    unedited = path.is_file() and sha256(path) == origin.validation_sha256 and not was_edited(path)
    return ValidationReport.load(path) if unedited else None
