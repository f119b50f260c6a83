"""What every artifact is compared with: base and steered model, run once on texts that nobody trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.data.behaviour import Behaviour, Context
from compile_steer.models.generate import continue_prompts
from compile_steer.models.kept_passes import KeptPasses
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
from compile_steer.models.reload import shallow_copy
from compile_steer.models.shared_blocks import SharedBlocks
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.scoring.answers import Answers
from compile_steer.scoring.base import ScorerBase
from compile_steer.scoring.questions import QUESTIONS
from compile_steer.stats import Equivalence, Measure
from compile_steer.steering.program import Program
from compile_steer.verification.contexts import Contexts
from compile_steer.verification.controls import CONTROL_PAIRS, SCALE_TEXTS
from compile_steer.verification.measured import Measured, VerifierTexts, measured_steered
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.parity import Parity, SampledScore
from compile_steer.verification.planned import planned_tests
from compile_steer.verification.precision import rounding_of
from compile_steer.verification.prompt_sets import PromptSets
from compile_steer.verification.sampled_score import SampledScores
from compile_steer.verification.written import GreedyAnswers, Written

T = TypeVar("T")


class Both(NamedTuple, Generic[T]):
    """One measurement of the base without and with the program's hooks."""

    base: T
    steered: T


class Reference:
    """A base model without and with the program's hooks, on the verifier's texts. What is measured is kept.

    Made for the base as it is; `quantized` makes it for the base with rounded weights, of which only what is read is run.
    """

    heldout: list[Encoded]  # held-out prompts with the steered model's own sampled continuations, as the base's tokens
    texts: VerifierTexts  # as the base's tokens
    measured: list[Measured]  # the steered model, then the artifacts that were measured
    greedy: GreedyAnswers
    by_files: dict[str, Parity]  # what was measured of artifacts, by what lies in their files

    def __init__(
        self,
        context: Context,
        program: Program,
        options: VerifyOptions,
        scorer: ScorerBase,
        ask: str,
        exact: Reference | None = None,
        rounding: str = "",
    ) -> None:
        """Write the texts and measure base and steered model, unless another reference has the texts.

        Args:
            scorer: the recipe's `validate.score`.
            ask: the prompt of the sample answer.
            exact: the reference of the base as it is, where this one's is rounded as `rounding` says.

        Raises:
            RecipeError: fewer than two test pairs.
            ArtifactError: the program changes nothing, or so much that KL(steered||base) is not finite.
        """
        # What is measured here runs the blocks below the program once, artifacts included that leave them alone.
        below = SharedBlocks(context.model, program.first_layer) if program.first_layer > 0 else None
        kept = KeptPasses(context.model, program, rounding)  # and once for all runs of this user
        self.model = replace(context.model, below=below, kept=kept)
        self.context, self.program, self.options, self.ask = replace(context, model=self.model), program, options, ask
        self._data, self._scorer = context.data, scorer
        self.by_files = {}
        self._quantized: tuple[str, Reference] | None = None
        self._scaled, self._exact = dict[float, tuple[Tensor, float]](), exact
        if exact is not None:
            self.heldout, self.texts = exact.heldout, exact.texts
            self.greedy = replace(exact.greedy, prompts=())  # no artifact's answers are compared with these
            return
        if (pairs := len(self._data.test)) < 2:
            raise RecipeError(f"data.test has {pairs} pairs; needed: two or more, to test for equivalence.")
        self._score = scorer.bind(self.model, self._data)  # a scorer that these data cannot have fails before the work
        plain, limit = QUESTIONS[: options.capability], options.max_new_tokens
        self.greedy = GreedyAnswers(self.prompts, ask, plain, self._score, limit, self._data.questions)
        with context.progress.phase("reference: base and steered model", 4) as advance:
            self.texts = VerifierTexts.of(self.model, self._data, options)
            self.heldout = continue_prompts(
                self.model,
                self.texts.heldout,
                program,
                max_new_tokens=limit,
                temperature=1.0,
                seed=context.seed + 1,
            )
            advance(1)
            if not 0 < self.kl_base.mean < math.inf:
                raise ArtifactError(
                    f"KL(steered||base) is {self.kl_base.mean:g} on the held-out texts: the program changes nothing "
                    "there, or too much to be computed. Needed: a program that steers; validate it again."
                )
            advance(1)
            # Read here so that all of the reference is measured under this bar, before any artifact is reloaded.
            _ = self.control_states, self.written, self.margins
            advance(1)
            score = self._score if scorer.needs_no_labels else None  # these prompts are not in the data
            self.prompt_sets = PromptSets(self.model, program, self._data, options, context.seed + 2, score)
            self.contexts = Contexts(self.context, program, options, self.heldout, self.states.steered)
            self.sampled_scores = self.sample_scores(self._data)
            self.measured = [measured_steered(self)]
            self.keep()
            advance(1)
            if kept.found:
                context.progress.remark(f"Base and steered model were run earlier; what they gave is in {kept.path}")
        # What the tests can show is noted before any artifact is seen.
        for plan in planned_tests(self):
            context.progress.remark(str(plan))

    def keep(self) -> None:
        """Keep what base and steered model wrote and computed for the next run."""
        if self._quantized:
            self._quantized[1].keep()
        if self.model.kept and (reason := self.model.kept.save()):
            self.context.progress.remark(f"Passes of base and steered model are not kept for the next run: {reason}")

    def texts_of(self, artifact: LoadedModel) -> VerifierTexts:
        """`texts` as the artifact's tokens."""
        same = artifact.tokenizer is self.model.tokenizer
        return self.texts if same else VerifierTexts.of(artifact, self._data, self.options)

    def sample_scores(self, data: Behaviour) -> SampledScores | None:
        """Sampled answers to the test prompts, and to the held-out ones where these can be scored; None with too few."""
        # A multiple-choice question is answered with a letter, not with a text.
        own = [pair.prompt for pair in data.test[: self.options.prompts] if pair.prompt not in data.questions]
        prompts, known, states = [Text(prompt) for prompt in own], list[Encoded](), None
        if self._scorer.needs_no_labels:
            prompts = [*data.heldout[: self.options.heldout], *prompts]
            known, states = self.heldout, self.states.steered
        if len(prompts) < 2:
            return None
        return SampledScores(self.context, self.program, self.options, self._score, prompts, known, states)

    def quantized(self, form: str, folder: Path) -> Reference | None:
        """The reference of the base rounded as the artifact at `folder` is stored; None where that keeps all bits."""
        if (stored := rounding_of(form, folder, self.model)) is None:
            return None
        self.model.require_resident(f"verifying {form}")
        key, rounding = stored
        if self._quantized is None or self._quantized[0] != key:  # made once for all artifacts of a form
            self.keep()
            self._quantized = None  # it is a model's size: freed before the next is made
            rounded = shallow_copy(self.model)
            with torch.no_grad():
                for name, parameter in rounded.model.named_parameters():
                    parameter.data = rounding(name, parameter).to(parameter, copy=False)
            context = replace(self.context, model=rounded)
            settings = self.options, self._scorer, self.ask, self, key
            self._quantized = key, Reference(context, self.program, *settings)
        return self._quantized[1]

    def _both(self, measure: Callable[[Program | None], T]) -> Both[T]:
        return Both(measure(None), measure(self.program))

    @cached_property
    def states(self) -> Both[FinalStates]:
        """Final hidden states on the held-out texts."""
        return self._both(lambda program: final_states(self.model, self.heldout, program))

    def kl_from_steered(self, other: LoadedModel, states: FinalStates) -> TokenDivergence:
        """KL(steered||other) at the positions that predict the held-out responses."""
        return compare_models(self.model, self.states.steered.response, other, states.response)

    def kl_at_prompts(self, other: LoadedModel, states: FinalStates) -> float:
        """Mean KL(steered||other) at the prompts' positions of the held-out texts."""
        return mean_at_prompts(self.model, self.states.steered, other, states)

    def scaled(self, scale: float) -> tuple[Tensor, float]:
        """Final hidden states that predict the first held-out responses, with the program at `scale`, without hooks at 0;
        and the mean KL from there to the base."""
        if scale not in self._scaled:
            base = self.states.base.first(SCALE_TEXTS)
            if scale in (0.0, 1.0):
                states = self.states.steered.first(SCALE_TEXTS) if scale else base
            else:
                states = final_states(self.model, self.heldout[:SCALE_TEXTS], self.program.scaled(scale)).response
            self._scaled[scale] = states, compare_models(self.model, states, self.model, base).mean if scale else 0.0
        return self._scaled[scale]

    @cached_property
    def kl_base(self) -> TokenDivergence:
        """KL(steered||base) there."""
        return self.kl_from_steered(self.model, self.states.base)

    @cached_property
    def rounding_alone(self) -> Both[TokenDivergence]:
        """KL of base and steered model in full precision from those of this reference, which is of the rounded base."""
        assert self._exact is not None
        both = zip(self._exact.states, self.states, strict=True)
        model = self._exact.model
        return Both(*(compare_models(model, one.response, self.model, other.response) for one, other in both))

    @cached_property
    def control_states(self) -> Both[Tensor]:
        """Final hidden states [n, d_model] that predict the responses of the control text."""
        return self._both(lambda program: final_states(self.model, self.texts.control, program).response)

    def kl_control(self, other: LoadedModel, states: Tensor) -> float:
        """Mean KL(base||other) there, where `states` are the other's."""
        return compare_models(self.model, self.control_states.base, other, states).mean

    @cached_property
    def kl_control_steered(self) -> float:
        """Mean KL(base||steered) there."""
        return self.kl_control(self.model, self.control_states.steered)

    @cached_property
    def other_pairs(self) -> list[Encoded]:
        """Another behaviour's pairs, as `encode_pairs`, for the controls of adapters, which have the base's tokenizer."""
        return encode_pairs(self.model, self._data.other_behaviour[:CONTROL_PAIRS])

    @cached_property
    def other_margins(self) -> np.ndarray:
        """The base's margins on them, [n_pairs]."""
        return logprob_margins(self.model, self.other_pairs)

    @cached_property
    def margins(self) -> Both[np.ndarray]:
        """log p(positive) - log p(negative) of each test pair, [n_pairs] nats per token."""
        return self._both(lambda program: logprob_margins(self.model, self.texts.pairs, program))

    @property
    def prompts(self) -> list[str]:
        """The test prompts that are answered in full."""
        return [pair.prompt for pair in self._data.test[: self.options.prompts]]

    @cached_property
    def written(self) -> Both[Written]:
        """What both write greedily."""
        return Both(*self.greedy.by(self.model, None, self.program))

    @property
    def answers(self) -> Both[Answers]:
        """Answers to the test prompts."""
        return Both(*(written.answers for written in self.written))

    @property
    def correct(self) -> Both[np.ndarray]:
        """Which capability questions are answered correctly, [n] 1 or 0."""
        return Both(*(written.correct for written in self.written))

    @cached_property
    def equivalence_margins(self) -> dict[Measure, float]:
        """Differences from the steered model that count as none, without the measures that steering does not move or nothing
        scores: a fraction of the steered effect in nats per token or, at most `gates.score_margin`, in points of the score."""
        gates = self.options.gates

        def fraction(base: np.ndarray, steered: np.ndarray) -> float:
            return gates.effect_margin * abs(float((steered - base).mean()))

        margins: dict[Measure, float] = {}
        if effect := fraction(*self.margins):
            margins["log-likelihood margin"] = effect
        # Where steering does not move the score there is no effect to take a fraction of.
        moved = fraction(*(answers.scores for answers in self.answers))
        margins["score"] = min(gates.score_margin, moved) or gates.score_margin
        return margins

    def compare_score(
        self, artifact: LoadedModel | None, states: FinalStates
    ) -> tuple[SampledScore | None, Equivalence | None]:
        """`SampledScores.compare` with the artifact, whose final states on the held-out texts are `states`."""
        if self.sampled_scores is None:
            return None, None
        known = states if self._scorer.needs_no_labels else None
        return self.sampled_scores.compare(artifact, known, self.equivalence_margins["score"])
