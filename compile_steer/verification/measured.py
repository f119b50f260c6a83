"""What a model does on the verifier's prompts, measured once for all artifacts that compute the same.

An artifact computes what another model does if their distributions agree on the texts of the verifier and all that these
texts cannot show is equal: what makes tokens of text and text of tokens, the tokens that end an answer, the configuration,
and the embeddings, which alone have weights that only some tokens or positions reach. Where all weights are equal, an
adapter's counted in, a few texts are enough. Then what was measured of the other is true of it. Every artifact is loaded from
its own files and compared in the verifier's own process: without that nothing is taken over, but where the files are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from compile_steer.models.fingerprint import fingerprints_apart
from compile_steer.models.forward import settings_of
from compile_steer.models.generate import end_tokens
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import (
    FinalStates,
    TokenDivergence,
    compare_models,
    encode_pairs,
    final_states,
    logprob_margins,
    mean_at_prompts,
)
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.scoring.answers import Answers
from compile_steer.stats import Equivalence
from compile_steer.steering.compare import distance
from compile_steer.verification.parity import SampledScore
from compile_steer.verification.prompt_report import ContextLength, PromptKL, PromptSet
from compile_steer.verification.same_weights import have_same_weights

if TYPE_CHECKING:
    from compile_steer.artifacts.provenance import Provenance
    from compile_steer.data.behaviour import Behaviour
    from compile_steer.verification.options import VerifyOptions
    from compile_steer.verification.reference import Reference

STEERED = "the steered model"
# Of log p, root mean square: sums in another order in float32 give 4e-6 on SmolLM2, an error of 1 % of the vector 1e-2.
_SAME = 1e-5
_FORMS = ("adapter", "merged-fp32", "merged-bf16", "merged-fp16")  # of a quantised file the base is another one
# A rounded form may be this part of the KL gate from what it was rounded from: its behaviour is then the same within what
# the tests of behaviour can see, for which the whole gate is allowed.
_ROUNDING = 0.1


class VerifierTexts(NamedTuple):
    """What the verifier uses of the data, as one model's tokens."""

    heldout: list[Encoded]
    control: list[Encoded]
    pairs: list[Encoded]  # as `encode_pairs`
    prompts: list[Encoded]  # those that are answered beyond those of the pairs

    @staticmethod
    def of(loaded: LoadedModel, data: Behaviour, options: VerifyOptions) -> VerifierTexts:
        """Encode them; raises as `encode`."""
        prompts = [Text(pair.prompt) for pair in data.test[options.pairs : options.prompts]]
        parts = data.heldout[: options.heldout], data.neutral[: options.neutral], prompts
        heldout, control, more = ([encode(loaded.tokenizer, text) for text in texts] for texts in parts)
        return VerifierTexts(heldout, control, encode_pairs(loaded, data.test[: options.pairs]), more)


class ReadArtifact(NamedTuple):
    """An artifact as it was loaded; `texts` are the verifier's as its tokens."""

    origin: Provenance
    loaded: LoadedModel
    texts: VerifierTexts
    fingerprint: Sequence[float]  # as `models.fingerprint`

    @property
    def name(self) -> str:
        return f"{self.origin.backend} {self.origin.form}"


@dataclass(frozen=True)
class Measured:
    """What one model does on the verifier's prompts; `model` and its final states tell others that compute the same.

    Attributes:
        name: of the artifact, or `STEERED`.
        states: final states on the held-out texts.
        kl: KL(steered||model) there.
        fingerprint: as `models.fingerprint`; empty of the steered model.
        kl_prompt: mean KL(steered||model) at the prompts' positions of these texts, nats per token.
        kl_control: mean KL(base||model) on the responses of the control text.
        margins: log-likelihood margins, [n_pairs].
        sample: the answer to the recipe's `ask`.
        correct: which capability questions are answered correctly, [n] 1 or 0.
        score: what `SampledScores.compare` returns.
    """

    name: str
    model: LoadedModel
    states: FinalStates
    kl: TokenDivergence
    fingerprint: Sequence[float]
    kl_prompt: float
    kl_control: float
    margins: np.ndarray
    answers: Answers
    sample: str
    correct: np.ndarray
    prompt_sets: list[PromptSet]
    wordings: list[PromptKL]
    contexts: list[ContextLength]
    score: tuple[SampledScore | None, Equivalence | None]


def measured_steered(reference: Reference) -> Measured:
    """The steered model, of which all is known."""
    nothing = TokenDivergence(torch.zeros_like(reference.kl_base.kl), torch.ones_like(reference.kl_base.same_top1))
    return Measured(
        STEERED,
        reference.model,
        reference.states.steered,
        nothing,
        (),
        0.0,
        reference.kl_control_steered,
        reference.margins.steered,
        *reference.written.steered,
        reference.prompt_sets.of_steered(),
        reference.prompt_sets.compare_wordings(None),
        reference.contexts.compare(None, nothing, reference.kl_base),
        reference.compare_score(None, reference.states.steered),
    )


def measure(
    reference: Reference, against: Reference, read: ReadArtifact, states: FinalStates, kl: TokenDivergence
) -> Measured:
    """Measure an artifact, whose `states` and `kl` are of the held-out texts.

    Of the control text the base is that of `against`, see `stage.measure_divergence`.
    """
    artifact = read.loaded
    return Measured(
        read.name,
        artifact,
        states,
        kl,
        read.fingerprint,
        reference.kl_at_prompts(artifact, states),
        against.kl_control(artifact, final_states(artifact, reference.texts.control).response),
        logprob_margins(artifact, read.texts.pairs),
        *reference.greedy.by(artifact, None)[0],
        reference.prompt_sets.compare(artifact),
        reference.prompt_sets.compare_wordings(artifact),
        reference.contexts.compare(artifact, kl, reference.kl_base),
        reference.compare_score(artifact, states),
    )


def same_weights(reference: Reference, read: ReadArtifact) -> tuple[Measured, str] | None:
    """What was measured of an artifact with the same weights, and how far the two are apart; None without one.

    `read` is one that `reads_alike`; without a fingerprint nothing is found.
    """
    n = len(read.fingerprint)
    for known in (one for one in reference.measured if n and len(one.fingerprint) == n):
        apart = fingerprints_apart(known.fingerprint, read.fingerprint)
        if apart <= _SAME and have_same_weights(read.loaded, known.model):
            how = f"with equal weights, and log p within {apart:.0e} nats a token on {n} other texts"
            return known, f"it computes the same, {how}"
    return None


def same_as(
    reference: Reference, artifact: LoadedModel, states: FinalStates, kl: TokenDivergence, *, rounded: bool
) -> tuple[Measured, str] | None:
    """What was measured of a model that `artifact` computes the same as, and how far the two are apart; None without one.

    Args:
        artifact: one that `reads_alike`.
        states: its own on the held-out texts.
        kl: KL(steered||artifact) there.
        rounded: whether its weights have fewer bits than those that it was made from.
    """
    for known in reference.measured:
        if not _near(known.states, states):
            continue
        model, of_steered = known.model, known.name == STEERED
        responses = kl if of_steered else compare_models(model, known.states.response, artifact, states.response)
        if not rounded:
            of_prompts, responses_kl = int(states.repeats.sum()), float(responses.kl.sum())
            n = len(responses.kl) + of_prompts
            # A small KL is half the variance of the difference of log p. The prompts' positions, which are most, are compared
            # only where the responses leave room for them.
            if (2 * responses_kl / n) ** 0.5 > _SAME:
                continue
            prompts = mean_at_prompts(model, known.states, artifact, states)
            apart = (2 * (responses_kl + prompts * of_prompts) / n) ** 0.5
            if apart <= _SAME:
                known = replace(known, kl_prompt=prompts) if of_steered else known
                return known, f"it computes the same, log p within {apart:.0e} nats at {n:,} positions"
        else:
            limit = _ROUNDING * reference.options.gates.kl_remaining * reference.kl_base.mean
            if responses.mean <= limit:
                known = replace(known, kl_prompt=reference.kl_at_prompts(artifact, states))
                moved = f"rounding moves it by KL {responses.mean:.1e} nats a token, which matters above {limit:.1e}"
                return known, moved
    return None


def _near(known: FinalStates, states: FinalStates) -> bool:
    """Whether final states are near enough for the distributions to be compared, which takes longer."""
    return distance(states.response, known.response) <= 0.1


def reads_alike(reference: Reference, read: ReadArtifact, rounded: LoadedModel | None) -> bool:
    """Whether all that the texts of the verifier cannot show is as the base has it: only of such models something is taken over,
    and only by them.

    `rounded` is the base with its weights rounded as the artifact's are; None if it has all bits.
    """
    if read.origin.form not in _FORMS:
        return False
    base, artifact = reference.model, read.loaded
    same_settings = settings_of(artifact.model) == settings_of(base.model)
    same_model = same_settings and _same_tables(artifact, rounded or base)
    return same_model and read.texts == reference.texts and _writes_alike(reference, artifact)


def _same_tables(artifact: LoadedModel, own: LoadedModel) -> bool:
    """Whether embeddings, of tokens and of positions, and head are the base's, which `reload` has then given one memory, and
    no adapter lies on one."""

    def tables(loaded: LoadedModel) -> dict[str, int | None]:
        model = loaded.layout.model  # without PEFT's wrapper, whose layers have the names of those that they wrap
        modules = {name: one for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
        modules["head"] = model.get_output_embeddings()
        return {name: None if isinstance(one, LoraLayer) else one.weight.data_ptr() for name, one in modules.items()}

    return tables(artifact) == tables(own)


def _writes_alike(reference: Reference, artifact: LoadedModel) -> bool:
    """Whether the artifact makes the same text of the verifier's tokens, and ends answers alike."""
    base, texts = reference.model, [list(text.ids) for text in (*reference.heldout, *reference.texts.control)]
    written = [[one.tokenizer.decode(ids) for ids in texts] for one in (base, artifact)]
    return written[0] == written[1] and end_tokens(base) == end_tokens(artifact)
