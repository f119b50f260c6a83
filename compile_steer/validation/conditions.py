"""The test prompts answered under every condition that the report compares, and what their scores say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Context
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode, require_room
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score
from compile_steer.stats import bootstrap_mean, sign_flip
from compile_steer.steering.program import Program
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.report import Scores, SweepPoint


def compare_scores(scores: Mapping[str, np.ndarray], seed: int) -> Scores:
    """The means of each condition's scores [n_prompts], and what steering has over the others."""
    means = {name: float(values.mean()) for name, values in scores.items()}
    lead = {name: scores["steered"] - values for name, values in scores.items()}
    over = {name: bootstrap_mean(values, seed=seed) for name, values in lead.items()}
    return Scores(
        base=means["base"],
        steered=means["steered"],
        random=means["random"],
        instructed=means.get("instructed"),
        few_shot=means.get("few_shot"),
        effect=over["base"],
        p_value=sign_flip(lead["base"], seed),
        over_random=over["random"],
        p_over_random=sign_flip(lead["random"], seed),
        over_instructed=over.get("instructed"),
        over_few_shot=over.get("few_shot"),
    )


def answer_conditions(
    context: Context,
    options: ValidateOptions,
    score: Score,
    program: Program,
    random: Sequence[Program],
    points: Sequence[tuple[Program, SweepPoint]],
    ask: str,
    too_high: float,
) -> tuple[dict[str, Answers], dict[str, str], list[SweepPoint], list[str]]:
    """Answer the test prompts under every condition, a few of them along the sweep, and the recipe's own question.

    Returns the answers by condition (without those that the recipe or the template lacks), the samples, the points with
    their scores, and a remark on a baseline that the recipe asks for but the model cannot have.
    """
    model, data = context.model, context.data
    prompts = [pair.prompt for pair in data.test[: options.prompts]]
    few = prompts[: options.dose_prompts]
    # Another random direction for each prompt tells more about them than one for all.
    by_chance = [random[n % len(random)] for n in range(len(prompts))]
    sampled = {"base": None, "steered": program, "too_high": program.scaled(too_high)}
    requests = [
        Request(prompts),
        Request(prompts, program),
        Request(prompts, by_chance),
        Request(prompts if options.instruction else [], ask=lambda prompt: Text(f"{prompt} {options.instruction}")),
        *(Request([ask], setting, scored=False) for setting in sampled.values()),
        *(Request(few, scaled) for scaled, _point in points),
    ]
    base, steered, chance, instructed, *rest = answer(model, requests, score, options.max_new_tokens, data.questions)
    answers = {"base": base, "steered": steered, "random": chance}
    if options.instruction:
        answers["instructed"] = instructed

    # Examples as earlier turns, in batches of their own: a batch is as long as its longest row.
    history = tuple((pair.prompt, pair.positive.response) for pair in data.train[: options.few_shot])
    remark = list[str]()
    try:
        encoded = [encode(model.tokenizer, Text(prompt, history=history)) for prompt in prompts]
        require_room(model, encoded, options.max_new_tokens)
    except RecipeError as error:  # the chat template cannot have earlier turns, or the model has too few positions
        shown = f"showing {len(history)} examples before the prompt (validate.few_shot)"
        remark = [
            f"{shown} was not measured, so steering is not compared with it: {error.problems[0].removeprefix('data: ')}"
        ]
    if history and not remark:
        request = Request(prompts, ask=lambda prompt: Text(prompt, history=history))
        (answers["few_shot"],) = answer(model, [request], score, options.max_new_tokens, data.questions)

    samples = {name: sample.texts[0] for name, sample in zip(sampled, rest, strict=False)}
    measured = [
        replace(point, score=float(a.scores.mean()), repetition=float(a.repetition.mean()))
        for (_program, point), a in zip(points, rest[len(sampled) :], strict=True)
    ]
    own = float(base.scores[: len(few)].mean()), float(base.repetition[: len(few)].mean())
    return answers, samples, [*measured, SweepPoint(0.0, 0.0, 1.0, *own)], remark
