"""Parity report of one artifact: what the verifier measured, in sections, and whether it passed.

KL is in nats per token; its first argument is always the distribution that the mean is taken under.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compile_steer.artifacts.files import load_json, save_record, was_edited
from compile_steer.artifacts.provenance import PARITY, Provenance, weights_sha256
from compile_steer.artifacts.revision import other_revision
from compile_steer.common.summary import Summary
from compile_steer.stats import LEVEL, Equivalence, Interval
from compile_steer.verification.prompt_report import ContextLength, PromptKL, PromptSet

_FOLLOWS = 0.25  # of the KL at any scale: adapters of linear edits leave up to 0.18 at -1


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions where they predict the steered model's own sampled continuations of held-out prompts.

    Intervals are 95 % bootstrap intervals over texts. Of a GGUF file, the base in `gain`, `hidden_error` and `kl_control*`
    is quantised the same way.
    """

    kl: Interval  # mean KL(steered||compiled)
    kl_rms: float  # its root mean square over tokens, which a few broken tokens raise that the mean hides
    kl_p99: float  # its 99th percentile over tokens
    kl_remaining: Interval  # KL(steered||compiled) as a fraction of KL(steered||base)
    kl_base: float  # mean KL(steered||base)
    kl_prompt: float  # mean KL(steered||compiled) at the prompts' positions
    top1: float  # fraction of tokens at which compiled and steered rank the same token first
    top1_base: float  # the same of base and steered
    gain: float  # least-squares factor of the compiled change of the final hidden states on the steered change
    hidden_error: float  # norm of compiled minus steered final hidden states, relative to the steered change
    kl_control: float  # mean KL(base||compiled) on the responses of the control text
    kl_control_steered: float  # mean KL(base||steered) there
    n_tokens: int
    n_texts: int
    top1_interval: Interval | None = None  # reports of earlier versions have none


@dataclass(frozen=True)
class SampledScore:
    """Answers of the steered model, sampled at temperature 1, that tell the compiled model's expected score by their weights.

    A weight is p_compiled / p_steered of an answer.
    """

    n_prompts: int
    n_samples: int  # answers that it took until the test of the score had an outcome, or all
    score_steered: float  # mean
    effective: float  # (sum of weights)^2 / sum of their squares
    mean_weight: float
    rejected: str  # why the weights are no basis for a test; empty if they are

    def __str__(self) -> str:
        return (
            f"{self.n_samples} answers that the steered model sampled to {self.n_prompts} prompts (mean score "
            f"{self.score_steered:.2f}), weighted: {self.effective:.1f} effective, mean weight {self.mean_weight:.3f}"
        )


@dataclass(frozen=True)
class BehaviourMatch:
    """Behaviour on the test pairs and in greedy answers to the test prompts; tests are of compiled minus steered.

    `score` tests expected scores by `sampled`; where that is None or rejected, the scores of the greedy answers. Of a GGUF
    file, base and steered margins are of the base quantised the same way; scores are full precision's.
    """

    # (compiled - base) / (steered - base) of the mean log-likelihood margin log p(positive) - log p(negative), with its 95 %
    # bootstrap interval. This and `margin` (in nats per token) are None where steering does not move the margin.
    effect_retained: Interval | None
    margin: Equivalence | None
    score: Equivalence
    score_base: float  # means of the answers' scores
    score_steered: float
    score_compiled: float
    repetition: Equivalence  # fraction of an answer's 3-grams that are repeats; only more repetition is a fault
    repetition_steered: float
    repetition_compiled: float
    n_pairs: int
    n_prompts: int
    sample: str  # the compiled model's answer to the recipe's `ask`
    sampled: SampledScore | None = None  # None where no sampled answer can be scored
    prompt_sets: dict[str, Any] | None = None  # a test that reports of earlier versions have
    # The first test prompts with the greedy answers, for people to read: by "prompt", "base", "steered" and "compiled".
    answers: list[dict[str, str]] = field(default_factory=list)

    @property
    def tests(self) -> list[Equivalence]:
        """The equivalence tests that were made."""
        return [t for t in (self.margin, self.score, self.repetition) if t is not None]


@dataclass(frozen=True)
class Capability:
    """Fractions of `n` short questions that base, steered and compiled model answer correctly."""

    n: int
    base: float
    steered: float
    compiled: float
    lost: int  # answered by steered and not by compiled
    gained: int  # the other way round
    p: float  # the exact one-sided McNemar test that no more are lost than gained
    test: Equivalence  # question by question

    @property
    def worse(self) -> bool:
        """True if more was lost than chance explains, or if the questions suffice to show equivalence and do not."""
        return self.p < LEVEL or (self.test.enough and not self.test.equivalent)

    def __str__(self) -> str:
        return (
            f"{self.n} questions answered freely: base {self.base:.2f}, steered {self.steered:.2f}, compiled {self.compiled:.2f}; "
            f"{self.lost} lost, {self.gained} gained (McNemar p = {self.p:.2g})"
        )


@dataclass(frozen=True)
class AdapterScale:
    """Divergence with program and adapter both at `scale` times their strength."""

    scale: float
    kl: float  # mean KL(steered||compiled)
    kl_remaining: float | None  # its fraction of KL(steered||base) at that scale; None at 0, where steered is the base

    def __str__(self) -> str:
        if self.kl_remaining is not None:
            return f"x{self.scale:g} remaining KL {self.kl_remaining:.2%}"
        return f"x{self.scale:g} " + ("the base" if self.kl == 0 else f"{self.kl:.1e} nats/token from the base")


@dataclass(frozen=True)
class AdapterControls:
    """Mean change of the log-likelihood margin from the base, nats per token, on the first `n_pairs` test pairs."""

    effect: float  # the adapter's
    random: list[float]  # those of random adapters with the same rank and norm in every module
    negated: float  # at scale -1
    halved: float  # at scale 0.5
    other_behaviour: float | None  # the adapter's on another behaviour's pairs; None without any
    n_pairs: int
    scales: list[AdapterScale]

    @property
    def scale_remark(self) -> str:
        """That the adapter does not follow its scale, where it does not; otherwise ''."""
        worst = max(
            (s for s in self.scales if s.kl_remaining is not None), key=lambda s: s.kl_remaining or 0.0, default=None
        )
        if worst is None or (worst.kl_remaining or 0.0) <= _FOLLOWS:
            return ""
        return f"it is for scale 1 alone ({worst}); compile.dial: true makes one that follows its scale"


@dataclass(frozen=True)
class Rounding:
    """What storing weights in fewer bits costs by itself, and the compile without that cost, on the held-out responses.

    "Rounded" is the base with its weights rounded as the artifact's are; every KL is a mean.
    """

    kl_base: float  # KL(base||rounded)
    kl_steered: float  # KL(steered||steered, on rounded)
    top1_steered: float  # their top-1 agreement
    kl: float  # KL(steered, on rounded||compiled): the compile alone
    kl_remaining: float  # its fraction of `kl_changed`
    kl_changed: float  # KL(steered, on rounded||rounded)
    edited: int  # matrices that are not rounded's own: the compile edited them, so they were rounded anew
    kl_edited: float | None  # KL(steered||steered with only these matrices of the base rounded); None: of no gate

    def __str__(self) -> str:
        cost = "" if self.kl_edited is None else f", which costs {self.kl_edited:.1e}"
        return (
            f"rounding alone {self.kl_base:.1e} nats/token from the base; without it KL {self.kl:.1e}, remaining "
            f"{self.kl_remaining:.3%} ({self.edited} matrices rounded anew{cost})"
        )


@dataclass(frozen=True)
class Check:
    """One check of an artifact: `text` says why it failed, or could not be made."""

    name: str
    outcome: Literal["passed", "failed", "not checked"]
    text: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Parity(Summary):
    """Comparison of one artifact with the steered model."""

    kind: Literal["parity report"] = "parity report"
    backend: str
    form: str
    exact: bool  # the backend reproduces the hooks exactly but for rounding
    compute_dtype: str  # what the verifier computed in
    compile_seconds: float
    same_tokens: bool  # the artifact's tokenizer splits the held-out prompts as the base's does
    # Largest difference, over the reference texts, of the mean log p between the file and the weights that the compiler had
    # in memory, nats per token; None for fewer bits, or where the compiler recorded nothing.
    file_error: float | None
    divergence: Divergence
    behaviour: BehaviourMatch
    prompt_sets: list[PromptSet]
    wordings: list[PromptKL] = field(
        default_factory=list
    )  # the same held-out prompts put otherwise, see `data.wordings`
    contexts: list[ContextLength] = field(default_factory=list)  # by length, shortest first; empty: not measured
    capability: Capability | None  # None where no questions were asked
    adapter: AdapterControls | None  # None for a whole model
    rounding: Rounding | None  # None for all bits
    passed: bool = False
    reasons: list[str] = field(default_factory=list)  # every gate that the artifact misses
    remarks: list[str] = field(default_factory=list)  # what could not be measured, and why
    inherited: str = ""  # the model that computes the same, of which the behaviour was measured; empty: this one
    unmeasured: dict[str, str] = field(default_factory=dict)  # the checks that need it, by their names
    checks: list[Check] = field(default_factory=list)  # all, with their outcomes; `gates.judged` by the figures above
    # The `verify` section, seed, prompt and device that it was measured by; what a report is bound to besides its hashes.
    settings: dict[str, Any] = field(default_factory=dict)
    # Of exactly the files that were loaded (`artifact`), of program, held-out texts, data and recipe; the base's revision.
    sha256: dict[str, str]

    @property
    def unchecked(self) -> list[Check]:
        """The checks that could not be made."""
        return [check for check in self.checks if check.outcome == "not checked"]

    @property
    def verdict(self) -> str:
        """The verdict in words; one that not every check has gone into says so."""
        verdict = "passed" if self.passed else "FAILED"
        names = ", ".join(dict.fromkeys(check.name for check in self.unchecked))
        return f"{verdict}; not checked: {names}" if names else verdict

    def summary_rows(self) -> list[tuple[str, str]]:
        d, b = self.divergence, self.behaviour
        return [
            ("verdict", self.verdict),
            *(("", reason) for reason in self.reasons),
            ("artifact", f"{self.backend} {self.form}"),
            ("KL(steered‖compiled)", f"{d.kl.value:.1e} nats/token on {d.n_tokens} held-out tokens"),
            ("remaining KL", f"{d.kl_remaining.value:.3%} [{d.kl_remaining.low:.3%}, {d.kl_remaining.high:.3%}]"),
            ("top-1 agreement", f"{d.top1:.2%}; base {d.top1_base:.2%}"),
            ("effect retained", str(b.effect_retained)),
            ("score", f"base {b.score_base:.2f}, steered {b.score_steered:.2f}, compiled {b.score_compiled:.2f}"),
        ]

    def bonds(self, folder: Path, origin: Provenance) -> list[tuple[str, str, str]]:
        """What ties the report to the artifact at `folder`, of provenance `origin`: (what, as reported, as it is there)."""
        base = self.sha256.get("base", "")
        same_base = bool(base) and not other_revision(origin.revision, base)  # an older record names its tensors alone
        return [
            ("weights", self.sha256.get("artifact", ""), weights_sha256(folder)),
            ("program", self.sha256.get("program", ""), origin.program_sha256),
            ("base", base, base if same_base else origin.revision),
            ("form", f"{self.backend} {self.form}", f"{origin.backend} {origin.form}"),
        ]

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Parity:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, Parity, "parity report", "Make it again with 'compile-steer verify'.")


def own_parity(folder: Path) -> Parity | None:
    """The parity report beside `folder`, if it is of this very artifact and nobody edited it; raises as `Parity.load`."""
    path = folder / PARITY
    if not path.is_file() or was_edited(path):
        return None
    parity, origin = Parity.load(path), Provenance.read(folder)
    return parity if all(found == needed for _what, found, needed in parity.bonds(folder, origin)) else None
