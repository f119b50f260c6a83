"""The validation report: everything that was measured on validation data (the sweep) and once on test data (the rest)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import load_json, save_record, sha256, was_edited
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.figures import probability
from compile_steer.common.summary import Summary
from compile_steer.stats import LEVEL, Interval, PowerAnalysis
from compile_steer.steering.directions import EVERY_BLOCK, FROM_LABELS

Verdict = Literal["pass", "fail", "inconclusive"]


_NAMED = 0.05  # a smaller loss is not in the first line


def block_name(layer: int) -> str:
    """A layer in words."""
    return "every block" if layer == EVERY_BLOCK else str(layer)


@dataclass(frozen=True)
class GridPoint:
    """One layer and coefficient of the sweep, on validation data."""

    layer: int
    coefficient: float
    margin: float | None = None  # mean change of the log-likelihood margin, nats per token
    perplexity_ratio: float | None = None  # of control text, over the base's
    p_value: float | None = None  # of the margin, by one-sided sign flips
    q_value: float | None = None  # Benjamini-Hochberg, over the sweep
    score: float | None = None  # of the answers, if any were generated here
    repetition: float | None = None
    evaluations: int | None = None  # that a solver needed to find the coefficient
    skipped: str = ""  # why it was not measured
    lost_answers: float | None = None  # fall of the right answers' likelihood among wrong ones, 0 to 1
    cost: float | None = None  # largest part of a limit that it uses up: perplexity, repetition, right answers

    def __str__(self) -> str:
        figures = {"margin {:+.3f}": self.margin, "perplexity x{:.2f}": self.perplexity_ratio}
        figures |= {"score {:.2f}": self.score, "repetition {:.3f}": self.repetition}
        figures |= {"right answers {:+.3f}": None if self.lost_answers is None else -self.lost_answers}
        measured = ", ".join(form.format(value) for form, value in figures.items() if value is not None)
        return f"layer {block_name(self.layer)}, coefficient {self.coefficient:.3g}: {self.skipped or measured}"


@dataclass(frozen=True)
class Rung:
    """One round of the search over layers: each layer's margin at its largest coherent coefficient, on `pairs` pairs."""

    pairs: int
    margins: dict[int, float]


@dataclass(frozen=True)
class Controls:
    """Effects of other directions of the same strength, on the same test pairs as `effect`, in nats per token."""

    effect: float
    random: list[float]
    shuffled: list[float]
    opposite: float  # of the program with the opposite sign
    other_behaviour: float | None  # of another behaviour's direction
    p_value: float  # rank of the effect among the random directions'
    p_random: float  # how likely one more random direction has an effect as large, see `stats.outlier_p`
    p_shuffled: float | None
    shuffled_kind: str = FROM_LABELS  # what the shuffled directions are made from, in words


@dataclass(frozen=True)
class Confound:
    """Something else than the behaviour that tells the two sides apart, or that the direction moves."""

    name: str
    evidence: str  # on the pairs that the direction is found from
    cure: str
    on_test: str = ""  # what steering does to test pairs with it and against it
    auroc: Interval | None = None  # of the two sides, by this alone
    p_value: float | None = None  # of a permutation test over all that was tried

    def __str__(self) -> str:
        on_test = self.on_test and f"; {self.on_test}"
        return f"confounded with {self.name}: {self.evidence}{on_test}. {self.cure}"


@dataclass(frozen=True)
class Separability:
    """How well the direction separates held-out pairs (Braun et al. 2505.22637)."""

    auroc: float
    d_prime: float
    mean_cosine: float


@dataclass(frozen=True)
class Scores:
    """Mean generation scores on test prompts under each condition, and paired differences with 95 % intervals."""

    base: float
    steered: float
    random: float  # random directions of the same strength, another one for each prompt
    instructed: float | None  # the base, with a request in the prompt
    few_shot: float | None  # the base, with examples before the prompt
    effect: Interval  # steered minus base
    p_value: float  # of the effect, by one-sided sign flips
    over_random: Interval
    p_over_random: float
    over_instructed: Interval | None
    over_few_shot: Interval | None


@dataclass(frozen=True)
class Coherence:
    """What steering costs."""

    perplexity_ratio: float  # of control text, over the base's
    repetition_base: float  # fraction of the answers' 3-grams that occurred before
    repetition_steered: float
    ended_base: float  # fraction of the answers that ended by themselves
    ended_steered: float
    strength: float  # mean displacement over the median norm of the stream, the largest of all sites
    log_perplexity: Interval | None = None  # of the log of `perplexity_ratio`, over texts


@dataclass(frozen=True)
class SideEffect:
    """What the steered model does less often than the base, besides the behaviour: fractions of `n`, paired."""

    name: str  # in words
    key: str  # of its tolerance in the recipe
    n: int
    base: float
    steered: float
    lost: Interval
    p: float  # that as much is lost by chance, by one-sided sign flips
    tolerance: float

    @property
    def shown(self) -> bool:
        """True if the loss is no chance."""
        return self.p <= LEVEL

    @property
    def violated(self) -> bool:
        return self.shown and self.lost.value > self.tolerance

    def __str__(self) -> str:
        lost, low, high = (round(100 * value) for value in (self.lost.value, self.lost.low, self.lost.high))
        shown = f"lost {lost} points [{low}, {high}], {probability(self.p)}; tolerance {100 * self.tolerance:.0f}"
        return f"{self.name}: {self.base:.0%} to {self.steered:.0%} of {self.n} ({shown})"


@dataclass(frozen=True)
class WordingEffect:
    """The change of the log-likelihood margin where the prompts are put otherwise, nats per token on `n` test pairs."""

    name: str
    effect: Interval
    as_given: float  # on the same pairs as they are
    n: int

    @property
    def holds(self) -> bool:
        """True if at least half of the effect is there."""
        return self.effect.value >= self.as_given / 2

    def __str__(self) -> str:
        return f"{self.name} {self.effect.value:+.3f} [{self.effect.low:+.3f}, {self.effect.high:+.3f}]"


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
    """The chosen layer at several coefficients, in ascending order."""

    points: list[SweepPoint]
    perplexity_limit: float
    crossing: float | None  # coefficient where the perplexity ratio crosses the limit, if it does
    negative_crossing: float | None


@dataclass(frozen=True, repr=False)
class ValidationReport(Summary):
    """What was measured, the verdict and its reasons."""

    # A keyword, so that it may come first in the JSON although it has a default.
    kind: Literal["validation report"] = field(default="validation report", kw_only=True)
    name: str
    layer: int
    coefficient: float
    grid: list[GridPoint]
    layer_search: list[Rung]
    power: list[PowerAnalysis]
    margin: Interval  # change of the log-likelihood margin on test pairs, nats per token
    p_margin: float  # by one-sided sign flips
    scores: Scores
    controls: Controls
    separability: Separability
    steerability: float  # mean slope of a pair's effect over the coefficient
    wrong_way: float  # fraction of the pairs whose slope is negative
    coherence: Coherence
    coefficient_sweep: CoefficientSweep
    samples: dict[str, str]  # answers to the recipe's own question: base, steered, too_high
    n_pairs: int
    n_prompts: int
    program_hash: str = ""  # SHA-256 of the program's file
    prompts_sha256: str = ""  # of the file with the result of every test pair and prompt
    inputs: str = ""  # fingerprint of what the report depends on
    verdict: Verdict = "inconclusive"
    reasons: list[str] = field(default_factory=list)
    confounds: list[Confound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # None in reports of earlier versions.
    side_effects: list[SideEffect] = field(default_factory=list)
    wordings: list[WordingEffect] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The chosen layer in words."""
        return block_name(self.layer)

    @property
    def frontier(self) -> list[GridPoint]:
        """The points of the sweep that score more than every one of lower cost, the cheapest first."""
        answered = [
            (p.perplexity_ratio or 0.0 if p.cost is None else p.cost, -p.score, p)
            for p in self.grid
            if p.score is not None
        ]
        points, best = list[GridPoint](), -1.0
        for _cost, negative, point in sorted(answered, key=lambda entry: entry[:2]):
            if -negative > best:
                points.append(point)
                best = -negative
        return points

    @property
    def price(self) -> str:
        """What steering was measured to cost, in words."""
        c = self.coherence
        costs = [
            f"{100 * effect.lost.value:.0f} points of {effect.name}" + " (may be chance)" * (not effect.shown)
            for effect in self.side_effects
            if effect.lost.value >= _NAMED
        ]
        costs.append(f"perplexity of control text x{c.perplexity_ratio:.2f}")
        if c.repetition_steered - c.repetition_base >= 0.01:
            costs.append(f"{100 * (c.repetition_steered - c.repetition_base):.0f} points more repeated 3-grams")
        if c.ended_base - c.ended_steered >= 0.01:
            costs.append(f"{100 * (c.ended_base - c.ended_steered):.0f} points fewer answers that end by themselves")
        return ", ".join(costs)

    @property
    def headline(self) -> str:
        """The verdict in one line: what is gained, at what price, what it may be confounded with, and where it does not hold."""
        s, fails = self.scores, [wording.name for wording in self.wordings if not wording.holds]
        doubt = [f"confounded with {', '.join(confound.name for confound in self.confounds)}"] * bool(self.confounds)
        doubt += [f"less than half of the effect with: {', '.join(fails)}"] * bool(fails)
        return "; ".join([f"score {s.base:.2f} to {s.steered:.2f}", f"price: {self.price}", *doubt])

    def summary_rows(self) -> list[tuple[str, str]]:
        s = self.scores
        return [
            ("verdict", f"{self.verdict}: {self.headline}"),
            *(("", reason) for reason in self.reasons),
            ("block, coefficient", f"{self.where}, {self.coefficient:g}"),
            ("log-likelihood margin", f"{self.margin} nats/token on {self.n_pairs} test pairs"),
            ("score", f"base {s.base:.2f}, steered {s.steered:.2f} on {self.n_prompts} test prompts"),
            ("perplexity of control text", f"x{self.coherence.perplexity_ratio:.2f}"),
        ]

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> ValidationReport:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, ValidationReport, "validation report", "Make it with 'compile-steer validate'.")


def own_validation(origin: Provenance, path: Path) -> ValidationReport | None:
    """Return the report at `path` if the artifact was compiled by it and nobody edited it."""
    unedited = path.is_file() and sha256(path) == origin.validation_sha256 and not was_edited(path)
    return ValidationReport.load(path) if unedited else None
