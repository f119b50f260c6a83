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
from compile_steer.data.behaviour import Context
from compile_steer.models.generate import continue_prompts
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import (
    FinalStates,
    TokenDivergence,
    divergence,
    encode_pairs,
    final_states,
    logprob_margins,
)
from compile_steer.models.reload import fresh_copy
from compile_steer.models.tokens import Encoded, encode
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score, ScorerBase
from compile_steer.stats import Measure, PowerAnalysis, power_analysis
from compile_steer.steering.program import Program
from compile_steer.verification.controls import CONTROL_PAIRS, SCALE_TEXTS, SCALES, correct_answers
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.precision import rounding_of
from compile_steer.verification.prompt_sets import PromptSets

T = TypeVar("T")


class Both(NamedTuple, Generic[T]):
    """One measurement of the base without and with the program's hooks."""

    base: T
    steered: T


class Reference:
    """A base model without and with the program's hooks, on the verifier's texts. What is measured is kept.

    Made for the base as it is; `quantized` makes it for the base with rounded weights, of which only what is read is run.

    Attributes:
        heldout: held-out prompts with the steered model's own sampled continuations, as the base's tokens.
        control: the control text, as the base's tokens.
    """

    heldout: list[Encoded]
    control: list[Encoded]

    def __init__(
        self,
        context: Context,
        program: Program,
        options: VerifyOptions,
        scorer: ScorerBase,
        ask: str,
        texts_of: Reference | None = None,
    ) -> None:
        """Write the texts and measure base and steered model, unless another reference has the texts.

        Args:
            scorer: the recipe's `validate.score`.
            ask: the prompt of the sample answer.

        Raises:
            RecipeError: fewer than two test pairs.
            ArtifactError: the program changes nothing, or so much that KL(steered||base) is not finite.
        """
        self.context, self.program, self.options, self.ask = context, program, options, ask
        self.model, self._data, self._scorer = context.model, context.data, scorer
        self._quantized: tuple[object, Reference] | None = None
        if texts_of is not None:
            self.heldout, self.control = texts_of.heldout, texts_of.control
            return
        if len(self._data.test) < 2:
            raise RecipeError(
                f"data.test has {len(self._data.test)} pairs; needed: two or more, to test for equivalence."
            )
        _ = self._score  # a scorer that these data cannot have fails before the work
        with context.progress.phase("reference: base and steered model", 4) as advance:
            self.heldout = continue_prompts(
                self.model,
                self._data.heldout[: options.heldout],
                program,
                max_new_tokens=options.max_new_tokens,
                temperature=1.0,
                seed=context.seed + 1,
            )
            self.control = [encode(self.model.tokenizer, text) for text in self._data.neutral[: options.neutral]]
            advance(1)
            if not 0 < self.kl_base.mean < math.inf:
                raise ArtifactError(
                    f"KL(steered||base) is {self.kl_base.mean:g} on the held-out texts: the program changes nothing "
                    "there, or too much to be computed. Needed: a program that steers; validate it again."
                )
            advance(1)
            # Read here so that all of the reference is measured under this bar, before any artifact is reloaded.
            _ = self.kl_control, self.correct, self.answers, self.other_behaviour
            advance(1)
            _ = self.prompt_sets
            advance(1)
        # What the tests can show is noted before any artifact is seen.
        for plan in self.planned_tests():
            context.progress.note(str(plan))

    def quantized(self, form: str, folder: Path) -> Reference | None:
        """The reference of the base with its weights rounded as the artifact at `folder` stores them; None where it keeps
        all bits."""
        stored = rounding_of(form, folder, self.model)
        if stored is None:
            return None
        key, rounding = stored
        if self._quantized is None or self._quantized[0] != key:  # made once for all artifacts of a form
            self._quantized = None  # it is a model's size: freed before the next is made
            rounded = fresh_copy(self.model)
            with torch.no_grad():
                for name, parameter in rounded.model.named_parameters():
                    parameter.copy_(rounding(name, parameter))
            context = replace(self.context, model=rounded)
            self._quantized = key, Reference(context, self.program, self.options, self._scorer, self.ask, self)
        return self._quantized[1]

    def _both(self, measure: Callable[[Program | None], T]) -> Both[T]:
        return Both(measure(None), measure(self.program))

    @cached_property
    def states(self) -> Both[FinalStates]:
        """Final hidden states on the held-out texts."""
        return self._both(lambda program: final_states(self.model, self.heldout, program))

    def kl_from_steered(self, other: LoadedModel, states: FinalStates) -> TokenDivergence:
        """KL(steered||other) at the positions that predict the held-out responses."""
        return divergence(self.model.model, self.states.steered.response, other.model, states.response)

    @cached_property
    def kl_base(self) -> TokenDivergence:
        """KL(steered||base) there."""
        return self.kl_from_steered(self.model, self.states.base)

    def kl_from_base_on_control(self, other: LoadedModel, program: Program | None = None) -> float:
        """Mean KL(base||other, under the program if given) on the responses of the control text, nats per token."""
        states = final_states(other, self.control, program).response
        return divergence(self.model.model, self._base_control, other.model, states).mean

    @cached_property
    def _base_control(self) -> Tensor:
        return final_states(self.model, self.control).response

    @cached_property
    def kl_control(self) -> float:
        """Mean KL(base||steered) on the responses of the control text, nats per token."""
        return self.kl_from_base_on_control(self.model, self.program)

    @cached_property
    def at_scales(self) -> dict[float, Tensor]:
        """Final states [n, d_model] on `scale_texts`, by the factor on the program; at 0 without any hook."""
        programs = {scale: self.program.scaled(scale) if scale else None for scale in SCALES}
        return {scale: final_states(self.model, self.scale_texts, one).response for scale, one in programs.items()}

    @property
    def scale_texts(self) -> list[Encoded]:
        """The first held-out texts: written at scale 1, and read at every scale."""
        return self.heldout[:SCALE_TEXTS]

    def margins_of(self, model: LoadedModel, program: Program | None = None) -> np.ndarray:
        """log p(positive) - log p(negative) of each test pair, [n_pairs] nats per token."""
        return logprob_margins(model, encode_pairs(model, self._data.test[: self.options.pairs]), program)

    @cached_property
    def margins(self) -> Both[np.ndarray]:
        """`margins_of` base and steered model."""
        return self._both(lambda program: self.margins_of(self.model, program))

    def control_pairs(self, model: LoadedModel) -> list[Encoded]:
        """The first test pairs as tokens, for an adapter's controls."""
        return encode_pairs(model, self._data.test[:CONTROL_PAIRS])

    @cached_property
    def other_behaviour(self) -> tuple[list[Encoded], np.ndarray] | None:
        """Another behaviour's pairs, and the base's margins on them; None where the recipe names none."""
        if not self._data.other_behaviour:
            return None
        pairs = encode_pairs(self.model, self._data.other_behaviour[:CONTROL_PAIRS])
        return pairs, logprob_margins(self.model, pairs)

    @cached_property
    def _score(self) -> Score:
        return self._scorer.bind(self.model, self._data)

    def answers_of(self, model: LoadedModel, *programs: Program | None) -> list[tuple[Answers, str]]:
        """Greedy scored answers to the test prompts, and the answer to `ask`, under each program; all in one batch."""
        prompts = [pair.prompt for pair in self._data.test[: self.options.prompts]]
        requests = [Request(prompts, program) for program in programs]
        requests += [Request([self.ask], program, scored=False) for program in programs]
        answers = answer(model, requests, self._score, self.options.max_new_tokens, self._data.questions)
        samples = [sample.texts[0] for sample in answers[len(programs) :]]
        return list(zip(answers[: len(programs)], samples, strict=True))

    @cached_property
    def answers(self) -> Both[Answers]:
        """Answers to the test prompts."""
        return Both(*(answers for answers, _sample in self.answers_of(self.model, None, self.program)))

    @cached_property
    def correct(self) -> Both[np.ndarray]:
        """Which capability questions are answered correctly, [n] 1 or 0."""
        return self._both(lambda program: correct_answers(self.model, self.options.capability, program))

    @cached_property
    def prompt_sets(self) -> PromptSets:
        """Base and steered model on the prompt sets, scored where the scorer takes prompts that are not in the data."""
        score = self._score if self._scorer.needs_no_labels else None
        return PromptSets(self.model, self.program, self._data, self.options, self.context.seed + 2, score)

    @cached_property
    def equivalence_margins(self) -> dict[Measure, float]:
        """Differences from the steered model that count as none: a fraction of the steered effect, in nats per token or, at
        most `gates.score_margin`, in points of the score. A measure is missing that steering does not move or nothing scores."""
        gates = self.options.gates

        def fraction(base: np.ndarray, steered: np.ndarray) -> float:
            return gates.effect_margin * abs(float((steered - base).mean()))

        def points(base: np.ndarray, steered: np.ndarray) -> float:
            # Where steering does not move the score there is no effect to take a fraction of.
            return min(gates.score_margin, fraction(base, steered)) or gates.score_margin

        margins: dict[Measure, float] = {}
        if effect := fraction(*self.margins):
            margins["log-likelihood margin"] = effect
        margins["score"] = points(*(answers.scores for answers in self.answers))
        sets = self.prompt_sets
        if sets.base_scores is not None and sets.steered_scores is not None:
            margins["score by prompt set"] = points(sets.base_scores, sets.steered_scores)
        return margins

    def planned_tests(self) -> list[PowerAnalysis]:
        """What the equivalence tests can be expected to show, from the reference alone."""
        steered = {"score": self.answers.steered.scores, "score by prompt set": self.prompt_sets.steered_scores}
        plans = []
        for measure, margin in self.equivalence_margins.items():
            values = steered.get(measure)
            if values is None:
                values = self.margins.steered - self.margins.base
                allowed = self.options.gates.kl_remaining
                left = math.sqrt(allowed)  # KL grows with the square of the error
                spread = left * float(np.sqrt(np.square(values).mean()))
                assumed = (
                    f"assuming {left:.0%} of the effect's size left over, as a remaining KL of {allowed:.0%} allows"
                )
            else:
                spread = math.sqrt(2) * float(values.std(ddof=1))  # of a difference: two variances add up
                assumed = "assuming that answers of compiled and steered model are independent"
            plans.append(power_analysis("equivalence", measure, margin, spread, len(values), assumed))
        return plans
