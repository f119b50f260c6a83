"""Parity report of one artifact: what the verifier measured, in sections, and whether it passed.

KL is in nats per token; its first argument is always the distribution that the mean is taken under.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import load_json, save_record, was_edited
from compile_steer.artifacts.provenance import PARITY, weights_sha256
from compile_steer.common.summary import Summary
from compile_steer.stats import LEVEL, Equivalence, Interval

PromptSetName = Literal["held-out", "off-topic", "multi-turn", "long"]


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions on the steered model's own sampled continuations of held-out prompts, where they predict the
    response. Intervals are 95 % bootstrap intervals over texts.

    Attributes:
        kl: mean KL(steered||compiled); `kl_rms` is its root mean square over tokens, which a few broken tokens raise that
            the mean hides, and `kl_p99` its 99th percentile.
        kl_remaining: KL(steered||compiled) as a fraction of KL(steered||base), whose mean is `kl_base`.
        kl_prompt: mean KL(steered||compiled) at the prompts' positions.
        top1: fraction of tokens at which compiled and steered rank the same token first; `top1_base` for base and steered.
        gain: least-squares factor of the compiled change of the final hidden states on the steered change.
        hidden_error: norm of compiled minus steered final hidden states, relative to the steered change.
        kl_control: mean KL(base||compiled) on the responses of the control text; `kl_control_steered` is KL(base||steered).

    Of a GGUF file, the base in `gain`, `hidden_error` and `kl_control*` is quantised the same way.
    """

    kl: Interval
    kl_rms: float
    kl_p99: float
    kl_remaining: Interval
    kl_base: float
    kl_prompt: float
    top1: float
    top1_base: float
    gain: float
    hidden_error: float
    kl_control: float
    kl_control_steered: float
    n_tokens: int
    n_texts: int


@dataclass(frozen=True)
class BehaviourMatch:
    """Behaviour on `n_pairs` test pairs and in greedy answers to `n_prompts` test prompts; equivalence tests are of compiled
    minus steered.

    Attributes:
        effect_retained: (compiled - base) / (steered - base) of the mean log-likelihood margin, with its 95 % bootstrap
            interval; None where steering does not move the margin.
        margin: test of the log-likelihood margins log p(positive) - log p(negative), nats per token; None as above.
        score: test of the answers' scores, whose means are `score_base`, `score_steered` and `score_compiled`.
        prompt_sets: test of the scores of the answers to all prompt sets, a prompt's greedy and sampled answer averaged;
            None where these prompts cannot be scored.
        repetition: test of the fraction of an answer's 3-grams that are repeats; only more repetition is a fault.
        sample: the compiled model's answer to the recipe's `ask`.

    Of a GGUF file, base and steered margins are of the base quantised the same way; scores are full precision's.
    """

    effect_retained: Interval | None
    margin: Equivalence | None
    score: Equivalence
    score_base: float
    score_steered: float
    score_compiled: float
    prompt_sets: Equivalence | None
    repetition: Equivalence
    repetition_steered: float
    repetition_compiled: float
    n_pairs: int
    n_prompts: int
    sample: str

    @property
    def tests(self) -> list[Equivalence]:
        """The equivalence tests that were made."""
        tests = (self.margin, self.score, self.prompt_sets, self.repetition)
        return [test for test in tests if test is not None]


@dataclass(frozen=True)
class FreeAnswers:
    """Answers to the prompts of one set that each model writes by itself; sampled ones with the same random numbers.

    Attributes:
        same: mean fraction of the steered answer's tokens before the first that differs in the compiled model's answer;
            `same_base` in the base's.
        repetition: mean fraction of repeated 3-grams in the compiled model's answers, `repetition_steered` in the steered's.
        score: the compiled model's mean score, likewise steered and base; None where the scorer knows only the data's prompts.
    """

    same: float
    same_base: float
    repetition: float
    repetition_steered: float
    score: float | None = None
    score_steered: float | None = None
    score_base: float | None = None


@dataclass(frozen=True)
class PromptSet:
    """One set of prompts: mean KL(steered||compiled), its fraction of KL(steered||base) (None where that is 0) and top-1
    agreement on `n_tokens` response tokens of the steered model's sampled answers, those of earlier turns included; and
    freely written answers. `prompt_tokens` is the longest prompt's length."""

    name: PromptSetName
    n_texts: int
    n_tokens: int
    prompt_tokens: int
    kl: float
    kl_remaining: float | None
    top1: float
    greedy: FreeAnswers
    sampled: FreeAnswers

    def __str__(self) -> str:
        remaining = "" if self.kl_remaining is None else f" ({self.kl_remaining:.2%})"
        return f"{self.greedy.same:.0%}, {self.sampled.same:.0%}{remaining}"


@dataclass(frozen=True)
class Capability:
    """Fractions of `n` short questions that base, steered and compiled model answer correctly.

    `lost` are answered by steered and not by compiled, `gained` the other way round; `p` is the exact one-sided McNemar
    test that no more are lost than gained, `test` the equivalence test question by question.
    """

    n: int
    base: float
    steered: float
    compiled: float
    lost: int
    gained: int
    p: float
    test: Equivalence

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
    """Mean KL(steered||compiled) with program and adapter both at `scale` times their strength, and its fraction of
    KL(steered||base) at that scale; None at 0, where steered is the base."""

    scale: float
    kl: float
    kl_remaining: float | None

    def __str__(self) -> str:
        if self.kl_remaining is not None:
            return f"x{self.scale:g} remaining KL {self.kl_remaining:.2%}"
        return f"x{self.scale:g} " + ("the base" if self.kl == 0 else f"{self.kl:.1e} nats/token from the base")


@dataclass(frozen=True)
class AdapterControls:
    """Mean change of the log-likelihood margin from the base, nats per token, on the first `n_pairs` test pairs.

    `effect` is the adapter's, `negated` and `halved` at scale -1 and 0.5, `random` those of random adapters with the same
    rank and norm in every module, `other_behaviour` the adapter's on another behaviour's pairs (None without any).
    """

    effect: float
    random: list[float]
    negated: float
    halved: float
    other_behaviour: float | None
    n_pairs: int
    scales: list[AdapterScale]


@dataclass(frozen=True)
class Rounding:
    """What storing weights in fewer bits costs by itself, and the compile without that cost: mean KL where the held-out
    responses are predicted. "Rounded" is the base with its weights rounded as the artifact's are.

    Attributes:
        kl_base: KL(base||rounded).
        kl_steered: KL(steered||steered, on rounded), and `top1_steered` their top-1 agreement.
        kl: KL(steered, on rounded||compiled): the compile alone.
        kl_remaining: its fraction of KL(steered, on rounded||rounded), which is `kl_changed`.
        edited: number of matrices that are not rounded's own: the compile edited them, so they were rounded anew.
        kl_edited: KL(steered||steered with only these matrices of the base rounded).
    """

    kl_base: float
    kl_steered: float
    top1_steered: float
    kl: float
    kl_remaining: float
    kl_changed: float
    edited: int
    kl_edited: float

    def __str__(self) -> str:
        return (
            f"rounding alone {self.kl_base:.1e} nats/token from the base; without it KL {self.kl:.1e}, remaining "
            f"{self.kl_remaining:.3%} ({self.edited} matrices rounded anew, which costs {self.kl_edited:.1e})"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Parity(Summary):
    """Comparison of one artifact with the steered model.

    Attributes:
        exact: True where the backend reproduces the hooks exactly but for rounding.
        compute_dtype: what the verifier computed in.
        same_tokens: True if the artifact's tokenizer splits the held-out prompts as the base's does.
        file_error: largest difference, over the reference texts, of the mean log p between the file and the weights that the
            compiler had in memory, nats per token; None for fewer bits, or where the compiler recorded nothing.
        capability: None where no questions were asked. `adapter`: None for a whole model. `rounding`: None for all bits.
        reasons: every gate that the artifact misses. `remarks`: what could not be measured, and why.
        sha256: of the artifact, its program and the held-out texts; and the base's revision.
    """

    kind: Literal["parity report"] = "parity report"
    backend: str
    form: str
    exact: bool
    compute_dtype: str
    compile_seconds: float
    same_tokens: bool
    file_error: float | None
    divergence: Divergence
    behaviour: BehaviourMatch
    prompt_sets: list[PromptSet]
    capability: Capability | None
    adapter: AdapterControls | None
    rounding: Rounding | None
    passed: bool = False
    reasons: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    sha256: dict[str, str]

    def summary_rows(self) -> list[tuple[str, str]]:
        d, b = self.divergence, self.behaviour
        return [
            ("verdict", "passed" if self.passed else "FAILED"),
            *(("", reason) for reason in self.reasons),
            ("artifact", f"{self.backend} {self.form}"),
            ("KL(steered‖compiled)", f"{d.kl.value:.1e} nats/token on {d.n_tokens} held-out tokens"),
            ("remaining KL", f"{d.kl_remaining.value:.3%} [{d.kl_remaining.low:.3%}, {d.kl_remaining.high:.3%}]"),
            ("same first token", f"{d.top1:.2%}; base {d.top1_base:.2%}"),
            ("effect retained", str(b.effect_retained)),
            ("score", f"base {b.score_base:.2f}, steered {b.score_steered:.2f}, compiled {b.score_compiled:.2f}"),
        ]

    @property
    def noise_kl(self) -> float:
        """What the artifact's precision costs the steered model itself, nats per token."""
        return 0.0 if self.rounding is None else self.rounding.kl_steered

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Parity:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, Parity, "parity report", "verify")


def own_parity(folder: Path) -> Parity | None:
    """The parity report beside `folder`, if it is of these weights and nobody edited it."""
    path = folder / PARITY
    if not path.is_file() or was_edited(path):
        return None
    parity = Parity.load(path)
    return parity if parity.sha256.get("artifact") == weights_sha256(folder) else None
