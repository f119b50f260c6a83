"""The judge's findings on one artifact, and the gates they must pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from compile_steer.artifacts.files import load_json, save_record, was_edited
from compile_steer.artifacts.provenance import PARITY, weights_sha256
from compile_steer.stats import Equivalence
from compile_steer.verify.adapter_scale import Dial
from compile_steer.verify.capability import Capability
from compile_steer.verify.options import Gates
from compile_steer.verify.prompt_sets import OnKind

# A compiled model that moves by more or less than this share of the steering has another dose, however
# small its divergence: a share of KL grows only with the square of the dose's error.
_DOSE_MARGIN = 0.05
# nats a token: fp32 in another order differs by a hundredth of it. A compile may be 2 % off; its file may not be.
_FILE_MARGIN = 1e-4


@dataclass(frozen=True)
class AdapterControls:
    """Mean change of log p(positive) - log p(negative) from the base, nats a token, on the first `n_pairs` test pairs.

    `effect` is the adapter's; `random` are adapters of the same rank and norm in every module; `negated` and `halved`
    are the adapter at scale -1 and 0.5; `other_behaviour` is the adapter on another behaviour's pairs.
    """

    effect: float
    random: list[float]
    negated: float
    halved: float
    other_behaviour: float | None
    n_pairs: int


@dataclass(frozen=True)
class Distance:
    """Compiled from steered, in the steered model's own sampled continuations of held-out prompts. KL in nats a token; p is
    always the steered model's distribution.

    `kl_*` and `top1_agreement` are over the positions that predict the response; `kl_prompt` over the prompt's. `kl_share`
    is over KL(steered||base) at the same positions. `*_low` and `*_high` of both are 95 % bootstrap intervals over the
    `n_texts` texts. `noise_*` is what the artifact's precision costs the steered model itself. `dose` is the least-squares
    factor of the compiled model's change of the final hidden state on the steered model's, `hidden_error` what it leaves;
    of a quantised file (GGUF) from the base quantised the same way.
    """

    kl_per_token: float
    kl_rms: float
    kl_p99: float
    kl_low: float
    kl_high: float
    kl_share: float
    kl_share_low: float
    kl_share_high: float
    kl_base: float
    kl_prompt: float
    top1_agreement: float
    top1_base: float
    noise_kl: float
    noise_top1: float
    hidden_error: float
    dose: float
    n_tokens: int
    n_texts: int


@dataclass(frozen=True)
class Rounding:
    """What storing weights in fewer bits costs, and the compile without that. KL in nats a token at the positions that
    predict the held-out responses.

    `kl_base` is KL(base||base rounded as the form is); what the same costs the steered model is the parity's `noise_kl`.
    `kl` is KL(steered||compiled) with the hooks on that rounded base: the compile alone. `share` is over KL(steered||base)
    there, `kl_changed`. `edited` matrices are not the rounded base's own, but rounded anew; rounding these alone costs the
    steered model `kl_edited`.
    """

    kl_base: float
    kl: float
    share: float
    kl_changed: float
    edited: int
    kl_edited: float

    def __str__(self) -> str:
        return (
            f"rounding alone {self.kl_base:.1e} nats/token from the base; without it KL {self.kl:.1e}, share {self.share:.3%} "
            f"({self.edited} matrices rounded anew, which costs {self.kl_edited:.1e})"
        )


@dataclass(frozen=True)
class Likeness:
    """How alike compiled and steered behave on test data.

    `recovery` is that of the log-probability contrast on test pairs; `score_*` are generation scores on test prompts.
    `contrast` (None where steering does not move it) and `score` are tests that the two are equivalent on these. Of a
    quantised file (GGUF) base and steered contrast are of the base quantised the same way; scores are full precision's.
    """

    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    score_base: float
    score_steered: float
    score_compiled: float
    contrast: Equivalence | None
    score: Equivalence
    repetition_steered: float
    repetition_compiled: float
    n_pairs: int
    n_prompts: int
    sample: str


@dataclass(frozen=True)
class Parity(Likeness, Distance):
    """Compiled against steered.

    `kinds` are prompts of other kinds, answered freely too. `neutral_drift_*` are KL from the base on neutral responses,
    nats a token (of a quantised file from the base quantised the same way). `rounding` is None where all bits are kept.
    `capability` are short questions with one right answer (of a quantised file base and steered are so too); None where none
    were asked. `controls` are an adapter's, `dial` is its scale against the program's. `score_by_kind` tests the answers to all
    `kinds` for equivalence, a prompt's greedy and sampled one as one; None where they cannot be scored. `file_error` is
    how far the file is from what the compiler had in memory: the largest difference of the mean log p of a fixed text, nats a
    token (None of a form of fewer bits, or where the compiler recorded nothing). `remarks` say what could not be measured.
    """

    backend: str
    form: str
    exact: bool
    kinds: list[OnKind]
    neutral_drift_steered: float
    neutral_drift_compiled: float
    same_tokens: bool
    compile_seconds: float
    sha256: dict[str, str]
    compute_dtype: str
    rounding: Rounding | None = None
    capability: Capability | None = None
    controls: AdapterControls | None = None
    dial: list[Dial] = field(default_factory=list)
    score_by_kind: Equivalence | None = None
    file_error: float | None = None
    passed: bool = False
    reasons: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def tests(self) -> list[Equivalence]:
        """Those of equivalence that were made."""
        return [test for test in (self.contrast, self.score, self.score_by_kind) if test is not None]

    @property
    def quantised(self) -> bool:
        """True of a file for llama.cpp: matrices are quantised, biases and norms are not."""
        return self.form.startswith("gguf-")

    def save(self, path: Path) -> None:
        save_record(path, asdict(self))

    @staticmethod
    def load(path: Path) -> Parity:
        """Raises `ArtifactError` for a missing or damaged report."""
        return load_json(path, Parity, "parity report", "verify")


def judge(parity: Parity, gates: Gates) -> list[str]:
    """Every reason why the artifact is not the steered model; empty where it passes."""
    return [*_far(parity, gates), *_unlike(parity, gates), *_elsewhere(parity, gates)]


def _far(parity: Parity, gates: Gates) -> Iterator[str]:
    """What is wrong with the next-token distributions on the held-out texts."""
    # What the precision costs the steered model itself, the compiled one may cost too: twice, because the
    # two roundings are independent.
    allowed_kl = (gates.exact_kl if parity.exact else gates.share * parity.kl_base) + 2 * parity.noise_kl
    wanted_top1 = (gates.exact_top1 if parity.exact else gates.top1) - 2 * (1 - parity.noise_top1)
    if parity.file_error is not None and not parity.file_error <= _FILE_MARGIN:
        yield (
            f"it is not what was compiled: mean log p of a fixed text is {parity.file_error:.1e} nats a token from what the "
            f"compiler's weights gave before they were written; at most {_FILE_MARGIN:.0e}"
        )
    if not parity.same_tokens:
        yield "the artifact's tokenizer splits held-out prompts differently from the base's"
    if not parity.kl_per_token <= allowed_kl:
        yield f"KL {parity.kl_per_token:.2e} nats a token (share {parity.kl_share:.2%}); at most {allowed_kl:.2e}"
    if parity.rounding is not None and parity.quantised:
        yield from _far_without(
            parity.rounding, gates.exact_kl if parity.exact else gates.share * parity.rounding.kl_changed
        )
    if not parity.top1_agreement >= wanted_top1:
        yield f"top-1 agreement {parity.top1_agreement:.2%}; at least {wanted_top1:.2%}"
    if not abs(parity.dose - 1) <= _DOSE_MARGIN:
        yield f"the dose is {parity.dose:.3f} of the steered model's; needed 1 +- {_DOSE_MARGIN:g}"


def _far_without(rounding: Rounding, allowed: float) -> Iterator[str]:
    """What is wrong with the compile of a quantised file: its edited matrices alone may be rounded another way."""
    allowed += 2 * rounding.kl_edited
    if not rounding.kl <= allowed:
        yield (
            f"KL {rounding.kl:.2e} nats a token (share {rounding.share:.2%}) from the hooks on the base quantised the same way; "
            f"at most {allowed:.2e}"
        )


def _unlike(parity: Parity, gates: Gates) -> Iterator[str]:
    """What is wrong with the behaviour."""
    if parity.recovery is None or parity.recovery_low is None:
        yield "the steered model's score does not differ from the base's: nothing to recover"
    else:
        if not parity.recovery >= gates.recovery:
            yield f"recovery {parity.recovery:.3f}; at least {gates.recovery:g}"
        if not parity.recovery_low >= gates.recovery_low:
            yield f"recovery's lower bound {parity.recovery_low:.3f}; at least {gates.recovery_low:g}"
    # So few prompts that they could not have shown it, whatever the artifact, are no reason.
    scores = [test for test in (parity.score, parity.score_by_kind) if test is not None and test.enough]
    yield from (str(test) for test in (parity.contrast, *scores) if test and not test.equivalent)
    if parity.capability is not None and parity.capability.worse:
        yield f"it can do less than the steered model: {parity.capability}; {parity.capability.test}"


def _elsewhere(parity: Parity, gates: Gates) -> Iterator[str]:
    """What is wrong on other texts, or with the adapter by itself."""
    # On other kinds of prompts what rounding costs was not measured, nor is a share of few tokens sure: exact in full
    # precision is what can be asked.
    if parity.exact and parity.noise_kl == 0:
        for one in parity.kinds:
            if not one.kl <= gates.exact_kl:
                yield f"KL {one.kl:.2e} nats a token on {one.kind} prompts; at most {gates.exact_kl:.2e}"
    allowed_drift = parity.neutral_drift_steered + gates.drift_margin
    if not parity.neutral_drift_compiled <= allowed_drift:
        yield f"drift on neutral text {parity.neutral_drift_compiled:.4f} nats a token; at most {allowed_drift:.4f}"
    # Elsewhere the dial is reported: a change that was trained at one dose need not scale with it.
    for dial in parity.dial:
        if dial.share is None and not dial.kl <= gates.exact_kl:
            yield f"KL(base||adapter at scale 0) {dial.kl:.2e} nats a token: something else has changed"
    if parity.controls is not None and not parity.controls.effect > max(parity.controls.random):
        yield (
            f"a random adapter of the same norms moves the test pairs as much ({max(parity.controls.random):.3f} against "
            f"{parity.controls.effect:.3f} nats a token): what it does is not the behaviour"
        )


def own_parity(folder: Path) -> Parity | None:
    """The parity report beside `folder`, if it is of these weights and nobody edited it."""
    path = folder / PARITY
    if not path.is_file() or was_edited(path):
        return None
    parity = Parity.load(path)
    return parity if parity.sha256.get("artifact") == weights_sha256(folder) else None
