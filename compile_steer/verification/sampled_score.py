"""The compiled model's expected score from the steered model's answers: likelihood ratios in the place of its own answers.

The steered model's answers y are sampled from its full distribution at temperature 1 and scored once, s(y). With weights
w(y) = p_compiled(y) / p_steered(y) the mean of (w - 1)(s - c) is the difference of the two models' expected scores, for every
constant c (importance sampling with a control variate: Owen, Monte Carlo theory, methods and examples, chapter 9). An answer
that the limit of new tokens cut is one event for both models, so the probabilities of its tokens are all that it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compile_steer.data.behaviour import Context
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, answer_logprobs, final_states
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.scoring.base import Reply, Score
from compile_steer.stats import LEVEL, Equivalence, equivalence, equivalence_sample_size
from compile_steer.steering.program import Program
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.parity import SampledScore

# Where few answers carry the sum, the estimate rests on large weights, most of which have not been drawn.
_LEAST_EFFECTIVE = 0.5
_STANDARD_ERRORS = 3.0  # that the mean weight may be away from 1, which it is on average
_LARGEST_LOG = 100.0


@dataclass(frozen=True)
class _Round:
    """One answer of the steered model to each prompt."""

    answers: list[Encoded]
    scores: np.ndarray  # [n_prompts]
    logprobs: np.ndarray  # log p(answer) under the steered model, [n_prompts] nats


class SampledScores:
    """The steered model's sampled answers to n prompts, in rounds of one answer each that are drawn when they are needed."""

    def __init__(
        self,
        context: Context,
        program: Program,
        options: VerifyOptions,
        score: Score,
        prompts: Sequence[Text],
        known: Sequence[Encoded] = (),
        states: FinalStates | None = None,
    ) -> None:
        """Draw the first round.

        Args:
            prompts: n prompts that `score` can score answers to.
            known: the steered model's sampled answers to the first of them, which are taken into the first round.
            states: the steered model's final states on `known`; those of an artifact are given to `compare`.
        """
        self._context, self._program, self._options, self._score = context, program, options, score
        self.prompts, self._known, self._rounds = tuple(prompts), tuple(known), list[_Round]()
        self._draw(states)

    @property
    def scores(self) -> np.ndarray:
        """Of the first round, [n_prompts]."""
        return self._rounds[0].scores

    def _draw(self, states: FinalStates | None = None) -> None:
        """Add a round: sampled from the full distribution at temperature 1, for weights of other samples would be others."""
        model, number, limit = self._context.model, len(self._rounds), self._options.max_new_tokens
        answers = [] if number else list(self._known)
        if prompts := self.prompts[len(answers) :]:
            seed = self._context.seed + 3 + number
            answers += continue_prompts(model, prompts, self._program, max_new_tokens=limit, temperature=1.0, seed=seed)
        written = zip(self.prompts, answers, strict=True)
        replies = [Reply(one.prompt, response_text(model, text), ended(model, text)) for one, text in written]
        logprobs = self._logprobs(model, answers, self._program, states)
        self._rounds.append(_Round(answers, self._score(replies), logprobs))

    def _logprobs(
        self, model: LoadedModel, answers: Sequence[Encoded], program: Program | None, states: FinalStates | None
    ) -> np.ndarray:
        """Log p of each answer, [n] nats; `states` are those of the answers that are known, if these are among them."""
        known = 0 if states is None else len(self._known)
        parts = [] if states is None else [answer_logprobs(model.model, answers[:known], states)]
        if others := answers[known:]:
            parts.append(answer_logprobs(model.model, others, final_states(model, others, program)))
        return np.concatenate(parts)

    def compare(
        self, artifact: LoadedModel | None, states: FinalStates | None, margin: float
    ) -> tuple[SampledScore, Equivalence | None]:
        """Test the artifact's expected score against +-`margin` points, on as many rounds as it takes.

        The test looks after 1, 2, 4, ... rounds and ends where equivalence or its opposite is shown. A look spends the part
        of the 5 % level that is its part of the answers (Lan and DeMets 1983, linear spending). The levels of all looks sum
        to 5 %, so by Bonferroni's inequality the whole test keeps it, however much the looks depend on each other.

        Args:
            artifact: None for the steered model itself, whose weights are all 1.
            states: the artifact's final states on the answers that were known; None without any.

        Returns what the test rests on, and the last look's test; None where the weights are no basis for one.
        """
        log_weights: list[np.ndarray] = []
        for rounds, level in looks(self._options.samples_per_prompt):
            for number in range(len(log_weights), rounds):
                if number == len(self._rounds):
                    self._draw()
                drawn = self._rounds[number]
                own = drawn.logprobs
                if artifact is not None:
                    own = self._logprobs(artifact, drawn.answers, None, None if number else states)
                log_weights.append(own - drawn.logprobs)
            scores = np.stack([drawn.scores for drawn in self._rounds[:rounds]])
            sampled, test = weighted_score(np.stack(log_weights), scores, margin, level)
            if test is None or test.equivalent or test.different:
                break
        return sampled, test


def looks(rounds: int) -> Iterator[tuple[int, float]]:
    """Yield (rounds so far, level) of each look: after 1, 2, 4, ... and all rounds, at levels that sum to `LEVEL`."""
    before = 0
    while before < rounds:
        so_far = min(max(1, 2 * before), rounds)
        yield so_far, LEVEL * (so_far - before) / rounds
        before = so_far


def weighted_score(
    log_weights: np.ndarray, scores: np.ndarray, margin: float, level: float
) -> tuple[SampledScore, Equivalence | None]:
    """Test the difference of the expected scores, from log weights and scores of the same answers, [n_rounds, n_prompts].

    The prompt is the unit: answers to one prompt are averaged first, because they are not independent. Without a test where
    the weights are no basis for one: few of them carry the sum (they may underflow), or their mean is not 1, because the
    compiled model writes answers that the steered model does not.
    """
    n_rounds, n_prompts = scores.shape
    largest = float(log_weights.max())
    relative = np.exp(log_weights - largest) if np.isfinite(largest) else np.zeros_like(log_weights)
    effective = float(relative.sum() ** 2 / max(np.square(relative).sum(), 1e-300))
    weights = np.exp(np.minimum(log_weights, _LARGEST_LOG))
    means = weights.mean(axis=0)
    error = float(means.std(ddof=1)) / n_prompts**0.5
    rejected = ""
    if effective < _LEAST_EFFECTIVE * scores.size:
        rejected = f"{effective:.1f} effective answers of {scores.size} are too few"
    elif abs(means.mean() - 1) > max(_STANDARD_ERRORS * error, margin / 10):
        rejected = f"the mean weight is {means.mean():.3f}, not 1: it writes what the steered model does not"
    sampled = SampledScore(
        n_prompts=n_prompts,
        n_samples=scores.size,
        score_steered=float(scores.mean()),
        effective=effective,
        mean_weight=float(means.mean()),
        rejected=rejected,
    )
    if rejected:
        return sampled, None
    # The mean score of the other prompts, so that it is a constant to this prompt's answers and biases nothing.
    sums = scores.sum(axis=0)
    others = (sums.sum() - sums) / (scores.size - n_rounds)
    differences = ((weights - 1) * (scores - others)).mean(axis=0)
    # Half the mean of |w - 1| bounds the difference whatever the scores are (total variation). Where that alone is small, no
    # rare score could hide a larger one; otherwise as many effective answers are needed as would show a rare score.
    variation = _equivalence(np.abs(weights - 1).mean(axis=0) / 2, margin, level, np.inf)
    return sampled, _equivalence(differences, margin, level, np.inf if variation.equivalent else effective)


def _equivalence(differences: np.ndarray, margin: float, level: float, seen: float) -> Equivalence:
    """`equivalence` for heavy tails: Hall's cubic transformation takes the skew from the t statistic (Hall 1992, "On the
    removal of skewness by transformation"), and each of the two tests counts one more prompt, as far on its wrong side as
    the farthest prompt is on any, for the large weights that have not been drawn.
    """
    from scipy.stats import t

    test = equivalence("score", differences, margin, level, seen)
    if test.spread == 0:
        return test
    n, farthest, bounds, p = len(differences) + 1, np.abs(differences).max(), [], [(1 - margin) ** seen]
    for side in (1, -1):
        values = np.append(side * differences, -farthest)
        mean, spread = float(values.mean()), float(values.std(ddof=1))
        skew = float(((values - mean) ** 3).mean()) / spread**3
        z = (mean + margin) / spread
        statistic = n**0.5 * (z + skew * z**2 / 3 + skew**2 * z**3 / 27 + skew / (6 * n))
        p.append(float(t.sf(statistic, n - 1)))
        quantile = float(t.ppf(1 - level, n - 1)) / n**0.5 - skew / (6 * n)  # and back, for the bound
        z = 3 * (np.cbrt(1 + skew * quantile) - 1) / skew if abs(skew) > 1e-6 else quantile
        bounds.append(side * (mean - spread * z))
    spread = float(np.append(differences, [farthest, -farthest]).std(ddof=1))
    needed = max(test.needed, equivalence_sample_size(spread, margin, level=level))
    low, high = (float(bound) for bound in bounds)
    return replace(test, low=low, high=high, p=max(p), needed=needed, equivalent=max(p) < level)
