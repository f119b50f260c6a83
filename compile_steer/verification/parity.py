"""Parity report of one artifact: what the verifier measured, in sections, and whether it passed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from compile_steer.artifacts.files import load_json, save_record, was_edited
from compile_steer.artifacts.provenance import PARITY, weights_sha256
from compile_steer.stats import LEVEL, Equivalence, Interval

PromptSetName = Literal["held-out", "off-topic", "multi-turn", "long"]


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions of compiled and steered model, on the steered model's own sampled continuations of
    held-out prompts. KL in nats per token, over the positions that predict the response.

    Attributes:
        kl: mean KL(steered||compiled) with its 95 % bootstrap interval over texts.
        kl_rms: root mean square over tokens; a few broken tokens raise it, where the mean hides them.
        kl_p99: 99th percentile over tokens.
        kl_remaining: KL(steered||compiled) as a fraction of KL(steered||base), with its 95 % bootstrap interval.
        kl_base: mean KL(steered||base).
        kl_prompt: mean KL(steered||compiled) over the prompts' positions.
        top1: fraction of tokens at which both models rank the same token first.
        top1_base: the same of the base.
        gain: least-squares factor of the compiled change of the final hidden states on the steered change.
        hidden_error: norm of compiled - steered final hidden states, relative to the steered change.
        kl_control_steered: mean KL(base||steered) on the responses of the control text.
        kl_control: mean KL(base||compiled) there.
        n_tokens: response tokens of the `n_texts` held-out texts.

    For a GGUF file the base of `gain`, `hidden_error` and `kl_control*` is the base quantised the same way.
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
    kl_control_steered: float
    kl_control: float
    n_tokens: int
    n_texts: int


@dataclass(frozen=True)
class BehaviourMatch:
    """Behaviour of compiled and steered model on test data.

    Attributes:
        effect_retained: (compiled - base) / (steered - base) of the mean log-likelihood margin, with its 95 % bootstrap
            interval; None where steering does not move the margin.
        margin: equivalence test of the log-likelihood margins log p(positive) - log p(negative), nats per token, of
            `n_pairs` test pairs; None where steering does not move them.
        score: equivalence test of the scores of greedy answers to `n_prompts` test prompts.
        score_base: mean score of the base; likewise steered and compiled.
        prompt_sets: equivalence test of the scores of the answers to all prompt sets, a prompt's greedy and sampled answer
            averaged; None where these prompts cannot be scored.
        repetition: equivalence test of the fraction of repeated 3-grams in the answers to the test prompts; only more
            repetition is a fault.
        repetition_steered: mean of that fraction; likewise compiled.
        sample: the compiled model's answer to the recipe's `ask`.

    For a GGUF file the base and steered margins are those of the base quantised the same way; scores are full precision's.
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
    """Answers to the prompts of one set, each model writing by itself; sampled ones with the same random numbers.

    Attributes:
        same: mean fraction of the steered answer's tokens before the first that differs in the compiled model's answer.
        same_base: the same of the base's answer.
        repetition: mean fraction of repeated 3-grams in the compiled model's answers.
        repetition_steered: the same of the steered model's.
        score: mean score of the compiled model's answers; likewise steered and base. None where the scorer knows only
            the data's own prompts.
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
    """One set of prompts: divergence on the steered model's sampled answers, and freely written answers.

    Attributes:
        prompt_tokens: length of the longest prompt.
        kl: mean KL(steered||compiled), nats per token, over `n_tokens` response tokens, those of earlier turns included.
        kl_remaining: as a fraction of KL(steered||base); None where that is 0.
        top1: fraction of tokens at which both models rank the same token first.
    """

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
    """Fractions of `n` short questions answered correctly by base, steered and compiled model.

    `lost` are answered by steered and not by compiled, `gained` the other way round; `p` is the exact one-sided McNemar
    test that no more are lost than gained. `test` is the equivalence test, question by question.
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
    """Mean KL(steered||compiled), nats per token, with program and adapter both at `scale` times their strength.

    `kl_remaining` is as a fraction of KL(steered||base) at that scale; None at 0, where steered is the base.
    """

    scale: float
    kl: float
    kl_remaining: float | None

    def __str__(self) -> str:
        if self.kl_remaining is not None:
            return f"x{self.scale:g} remaining KL {self.kl_remaining:.2%}"
        return f"x{self.scale:g} " + ("the base" if self.kl == 0 else f"{self.kl:.1e} nats/token from the base")


@dataclass(frozen=True)
class AdapterControls:
    """What the reloaded adapter does by itself: the mean change of the log-likelihood margin from the base, nats per
    token, on the first `n_pairs` test pairs.

    Attributes:
        effect: the adapter's.
        random: those of random adapters with the same rank and norm in every module.
        negated: the adapter's at scale -1; `halved` at 0.5.
        other_behaviour: the adapter's on another behaviour's pairs; None where the recipe names none.
        scales: adapter scale against program scale.
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
    """What storing weights in fewer bits costs by itself, and the compile without that cost. Mean KL in nats per token over
    the positions that predict the held-out responses; "rounded" are the base's weights, rounded as the artifact's are.

    Attributes:
        kl_base: KL(base||rounded base).
        kl_steered: KL(steered||steered on the rounded base), and `top1_steered` the agreement of the two.
        kl: KL(steered on the rounded base||compiled): the compile alone.
        kl_remaining: as a fraction of KL(steered on the rounded base||rounded base), which is `kl_changed`.
        edited: matrices that are not the rounded base's own, which were therefore rounded anew.
        kl_edited: KL(steered||steered with only the edited matrices of the base rounded).
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


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Comparison of one artifact with the steered model.

    Attributes:
        exact: True where the backend reproduces the hooks exactly but for rounding.
        compute_dtype: what the verifier computed in.
        compile_seconds: time of the compile alone.
        same_tokens: True if the artifact's tokenizer splits the held-out prompts as the base's does.
        file_error: largest difference, over fixed texts, of the mean log p per token between the file and the weights that
            the compiler had in memory, nats; None for fewer bits, or where the compiler recorded nothing.
        capability: None where no questions were asked.
        adapter: None for a whole model.
        rounding: None where all bits are kept.
        reasons: every gate that the artifact misses.
        remarks: what could not be measured, and why.
        sha256: of artifact, program and texts; the base's revision.
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
