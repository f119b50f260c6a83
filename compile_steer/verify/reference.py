"""What every artifact is compared with: the base and the hooked model, run once on texts nobody trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
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
from compile_steer.models.tokens import Encoded, encode
from compile_steer.recipe import Recipe
from compile_steer.scoring.answers import Request, answer
from compile_steer.scoring.base import Score
from compile_steer.stats import Measure, PowerAnalysis, power_analysis
from compile_steer.steering.program import Program
from compile_steer.verify.capability import answered
from compile_steer.verify.prompt_sets import Kinds
from compile_steer.verify.quantized import Rounded, Rounding

DIALS = (0.0, 0.5, 1.0, -1.0)
_DIAL_TEXTS = 4
CONTROL_PAIRS = 8  # of an adapter's own controls, which are there to be seen, not to be measured finely


@dataclass(frozen=True)
class Behaving:
    """How a model behaves: contrast per test pair, scores and repetition per test prompt, the sample answer."""

    contrast: np.ndarray
    scores: np.ndarray
    repetition: np.ndarray
    sample: str


def behave(
    loaded: LoadedModel, behaviour: Behaviour, recipe: Recipe, score: Score, programs: Sequence[Program | None]
) -> list[Behaving]:
    """Score test pairs, and greedy free-running answers to test prompts, under each program (None: as it is)."""
    options = recipe.verify
    if len(behaviour.test) < 2:
        raise RecipeError(f"data.test has {len(behaviour.test)} pairs; needed: two or more, to test for equivalence.")
    pairs = encode_pairs(loaded, behaviour.test[: options.pairs])
    prompts = [pair.prompt for pair in behaviour.test[: options.prompts]]
    requests = [Request(prompts, program) for program in programs]
    requests += [Request([recipe.ask], program, scored=False) for program in programs]
    answers = answer(loaded, requests, score, options.max_new_tokens, behaviour.questions)
    asked, samples = answers[: len(programs)], answers[len(programs) :]
    return [
        Behaving(logprob_margins(loaded, pairs, program), one.scores, one.repetition, sample.texts[0])
        for program, one, sample in zip(programs, asked, samples, strict=True)
    ]


@dataclass(frozen=True)
class Margins:
    """Differences from the steered model that count as none: of the contrast in nats a token (0 where steering does not
    move it, so that there is nothing to be equivalent in), of the score in points; and of the score of the answers to
    prompts of every kind (None where these cannot be scored)."""

    contrast: float
    score: float
    by_kind: float | None


class Reference:
    """Base and steered model on held-out continuations, neutral text, test pairs and test prompts."""

    def __init__(
        self, recipe: Recipe, base: LoadedModel, program: Program, behaviour: Behaviour, progress: Progress
    ) -> None:
        self.recipe, self.base, self.program, self.behaviour = recipe, base, program, behaviour
        self.score = recipe.validate_.score.bind(base, behaviour)
        self._rounded: tuple[object, Rounded] | None = None
        with progress.phase("reference: base and steered model", 5) as advance:
            self.heldout = continue_prompts(
                base,
                behaviour.heldout[: recipe.verify.heldout],
                program,
                max_new_tokens=recipe.verify.max_new_tokens,
                temperature=1.0,
                seed=recipe.seed + 1,
            )
            advance(1)
            self.neutral = [encode(base.tokenizer, text) for text in behaviour.neutral[: recipe.verify.neutral]]
            self.base_heldout, self.steered_heldout = (final_states(base, self.heldout, p) for p in (None, program))
            advance(1)
            self.base_neutral, steered_neutral = (final_states(base, self.neutral, p) for p in (None, program))
            self.base_divergence = self.from_steered(base, self.base_heldout)
            if not 0 < self.base_divergence.mean < math.inf:
                raise ArtifactError(
                    f"KL(steered||base) is {self.base_divergence.mean:g} on the held-out texts: the program changes nothing "
                    "there, or too much to be computed. Needed: a program that steers; validate it again."
                )
            self.neutral_drift = self.drift(base, steered_neutral)
            advance(1)
            self.base_able, self.steered_able = (answered(base, recipe.verify.capability, p) for p in (None, program))
            self.base_behaving, self.steered_behaving = behave(base, behaviour, recipe, self.score, [None, program])
            self.other_behaviour = self._other_behaviour()
            advance(1)
            scored = self.score if recipe.validate_.score.needs_no_labels else None
            self.kinds = Kinds(base, program, behaviour, recipe.verify, recipe.seed + 2, scored)
            advance(1)
        self.margins = self._margins()
        for one in self.planned():
            progress.note(str(one))

    def _margins(self) -> Margins:
        gates, base, steered = self.recipe.verify.gates, self.base_behaving, self.steered_behaving

        def share(base: np.ndarray, steered: np.ndarray) -> float:
            return gates.effect_margin * abs(float((steered - base).mean()))

        def points(base: np.ndarray, steered: np.ndarray) -> float:
            # Where steering does not move the score there is no effect to take a share of.
            return min(gates.score_margin, share(base, steered)) or gates.score_margin

        kinds = self.kinds.base_scores, self.kinds.steered_scores
        return Margins(
            share(base.contrast, steered.contrast),
            points(base.scores, steered.scores),
            None if kinds[0] is None or kinds[1] is None else points(kinds[0], kinds[1]),
        )

    def planned(self) -> list[PowerAnalysis]:
        """What the tests of equivalence can be expected to show, from the reference alone: before any artifact is seen."""
        gates, base, steered = self.recipe.verify.gates, self.base_behaving, self.steered_behaving
        effect = steered.contrast - base.contrast
        # KL grows with the square of what is left over.
        left = math.sqrt(gates.share)
        found = []
        if self.margins.contrast:
            spread = left * float(np.sqrt(np.square(effect).mean()))
            assumed = f"assuming {left:.0%} of the effect's size left over, as a share of {gates.share:.0%} allows"
            found.append(
                power_analysis(
                    "equivalence", "log-likelihood margin", self.margins.contrast, spread, len(effect), assumed
                )
            )
        scored: dict[Measure, tuple[np.ndarray | None, float | None]] = {
            "score": (steered.scores, self.margins.score),
            "score by prompt set": (self.kinds.steered_scores, self.margins.by_kind),
        }
        for what, (scores, margin) in scored.items():
            if scores is not None and margin is not None:
                spread = math.sqrt(2) * float(scores.std(ddof=1))
                assumed = "assuming compiled and steered answers that know nothing of each other"
                found.append(power_analysis("equivalence", what, margin, spread, len(scores), assumed))
        return found

    def _other_behaviour(self) -> tuple[list[Encoded], np.ndarray] | None:
        """Another behaviour's pairs, and the base's contrast on them, if they were given."""
        if not self.behaviour.other_behaviour:
            return None
        pairs = encode_pairs(self.base, self.behaviour.other_behaviour[:CONTROL_PAIRS])
        return pairs, logprob_margins(self.base, pairs)

    def from_steered(self, other: LoadedModel, states: FinalStates) -> TokenDivergence:
        """KL(steered || other) at the positions that predict the held-out responses."""
        return divergence(self.base.model, self.steered_heldout.response, other.model, states.response)

    def prompt_kl(self, other: LoadedModel, states: FinalStates) -> float:
        """Mean KL(steered || other) over the other positions of the held-out texts, nats a token."""
        return divergence(self.base.model, self.steered_heldout.prompt, other.model, states.prompt).mean

    def drift(self, other: LoadedModel, states: FinalStates) -> float:
        """Mean KL(base || other) over the neutral responses, nats a token."""
        return divergence(self.base.model, self.base_neutral.response, other.model, states.response).mean

    @property
    def dial_texts(self) -> list[Encoded]:
        """The first held-out texts: written at the program's own dose, and read at every one."""
        return self.heldout[:_DIAL_TEXTS]

    @cached_property
    def dialled(self) -> dict[float, torch.Tensor]:
        """Final states [n, d_model] that predict the responses of `dial_texts`, by the factor on every coefficient.

        At 0 they are the base's own, with no hook at all.
        """
        return {
            scale: final_states(self.base, self.dial_texts, self.program.scaled(scale) if scale else None).response
            for scale in DIALS
        }

    @property
    def base_contrast(self) -> np.ndarray:
        """[n_pairs], nats a token."""
        return self.base_behaving.contrast

    @property
    def steered_contrast(self) -> np.ndarray:
        """[n_pairs], nats a token."""
        return self.steered_behaving.contrast

    def rounded(self, key: object, rounding: Rounding) -> Rounded:
        """The same with the base's weights rounded; kept until another `key` is asked for, since it is a model's size."""
        if self._rounded is None or self._rounded[0] != key:
            self._rounded = None  # freed before the next is made
            options = self.recipe.verify
            pairs = encode_pairs(self.base, self.behaviour.test[: options.pairs])
            texts = (self.heldout, self.neutral, pairs, options.capability)
            whole = (self.base_heldout, self.steered_heldout)
            self._rounded = key, Rounded(self.base, self.program, *texts, whole, rounding)
        return self._rounded[1]
