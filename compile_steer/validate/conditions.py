"""Test prompts answered under every arm: base, steered, random directions, asked, shown examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode
from compile_steer.recipe import Recipe
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score
from compile_steer.stats import bootstrap_mean, sign_flip
from compile_steer.steering.program import Program
from compile_steer.validate.options import Validate
from compile_steer.validate.report import CoefficientSweep, Scores
from compile_steer.validate.strengths import Dosed, response


@dataclass(frozen=True)
class Arms:
    """Answers to the same n test prompts; asked and shown are None where the recipe or the template has none."""

    prompts: list[str]
    base: Answers
    steered: Answers
    random: Answers
    instructed: Answers | None
    few_shot: Answers | None
    samples: dict[str, str]
    doses: CoefficientSweep

    def scores(self, seed: int) -> Scores:
        def over(other: Answers | None) -> Any:
            return None if other is None else bootstrap_mean(self.steered.scores - other.scores, seed=seed)

        return Scores(
            base=float(self.base.scores.mean()),
            steered=float(self.steered.scores.mean()),
            random=float(self.random.scores.mean()),
            instructed=None if self.instructed is None else float(self.instructed.scores.mean()),
            few_shot=None if self.few_shot is None else float(self.few_shot.scores.mean()),
            effect=over(self.base),
            p_value=sign_flip(self.steered.scores - self.base.scores, seed),
            over_random=over(self.random),
            p_over_random=sign_flip(self.steered.scores - self.random.scores, seed),
            over_instructed=over(self.instructed),
            over_few_shot=over(self.few_shot),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row a prompt: every arm's answer and score."""
        arms = {
            "base": self.base,
            "steered": self.steered,
            "random": self.random,
            "instructed": self.instructed,
            "few_shot": self.few_shot,
        }
        return [
            {"kind": "answer", "prompt": prompt}
            | {
                name: {"text": one.texts[at], "score": float(one.scores[at]), "repetition": float(one.repetition[at])}
                for name, one in arms.items()
                if one is not None
            }
            for at, prompt in enumerate(self.prompts)
        ]


def answer_arms(
    recipe: Recipe,
    loaded: LoadedModel,
    behaviour: Behaviour,
    program: Program,
    random: Sequence[Program],
    doses: Sequence[Dosed],
    score: Score,
) -> Arms:
    """Answer the test prompts under every arm, and the recipe's own question at three settings of the dial."""
    options = recipe.validate_
    prompts = [pair.prompt for pair in behaviour.test[: options.prompts]]
    few = prompts[: options.dose_prompts]
    # Another random direction for every prompt says more of them than one for all.
    by_chance = [random[at % len(random)] for at in range(len(prompts))]
    dial = {"base": None, "steered": program, "too_high": program.scaled(recipe.too_high)}
    requests = [
        Request(prompts),
        Request(prompts, program),
        Request(prompts, by_chance),
        Request(prompts if options.instruction else [], ask=lambda prompt: Text(f"{prompt} {options.instruction}")),
        *(Request([recipe.ask], setting, scored=False) for setting in dial.values()),
        *(Request(few, dose.program) for dose in doses),
    ]
    base, steered, chance, instructed, *rest = answer(
        loaded, requests, score, options.max_new_tokens, behaviour.questions
    )
    samples, dosed = rest[: len(dial)], rest[len(dial) :]
    own = float(base.scores[: len(few)].mean()), float(base.repetition[: len(few)].mean())
    scores, repeats = [float(one.scores.mean()) for one in dosed], [float(one.repetition.mean()) for one in dosed]
    return Arms(
        prompts=prompts,
        base=base,
        steered=steered,
        random=chance,
        instructed=instructed if options.instruction else None,
        few_shot=_few_shot(loaded, behaviour, prompts, score, options),
        samples={name: one.texts[0] for name, one in zip(dial, samples, strict=True)},
        doses=response(doses, scores, repeats, own, options.max_perplexity_ratio),
    )


def _few_shot(
    loaded: LoadedModel, behaviour: Behaviour, prompts: Sequence[str], score: Score, options: Validate
) -> Answers | None:
    """The base after the first training positives as earlier turns; None where the template cannot have them.

    By themselves, because the rows are far longer than the other arms' and a batch is as long as its longest row.
    """
    history = tuple((pair.prompt, pair.positive.response) for pair in behaviour.train[: options.few_shot])
    if not history:
        return None
    try:
        encode(loaded.tokenizer, Text(prompts[0], history=history))
    except RecipeError:
        return None
    request = Request(prompts, ask=lambda prompt: Text(prompt, history=history))
    (found,) = answer(loaded, [request], score, options.max_new_tokens, behaviour.questions)
    return found


def pair_rows(pairs: Sequence[Pair], base: np.ndarray, change: np.ndarray) -> list[dict[str, Any]]:
    """One row a test pair: log p(positive) - log p(negative) of base and steered, nats a token."""
    return [
        {"kind": "pair", "prompt": pair.prompt, "base": float(before), "steered": float(before + more)}
        for pair, before, more in zip(pairs, base, change, strict=True)
    ]
