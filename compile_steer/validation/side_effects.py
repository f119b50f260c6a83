"""What steering costs besides the behaviour: plain questions, refusals, the language, instructions; steered against base."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.common.reading import read_json_lines
from compile_steer.data.behaviour import Behaviour, Check, Context
from compile_steer.data.section import TEXTS
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode, require_room
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Reply
from compile_steer.scoring.language import languages
from compile_steer.scoring.questions import ANSWER_TOKENS, QUESTIONS, PlainQuestion
from compile_steer.scoring.text import IFEval
from compile_steer.stats import bootstrap_mean, sign_flip
from compile_steer.steering.program import Program
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.report import SideEffect

_REFUSAL = re.compile(
    r"\b(i'?m (very |so |really )?sorry|i apologi[sz]e|as an? (ai|language model)|"
    r"i('m| am) (not able|unable)|(i|we) (can(no|')t|can not|won'?t|will not|am not allowed))\b",
    re.IGNORECASE,
)
_SMALL_WORDS = 4  # of a language, from which on a text is taken to be in it
_START = 120  # characters in which a refusal says so


def askable(model: LoadedModel, count: int) -> tuple[tuple[PlainQuestion, ...], str]:
    """The first `count` plain questions, or none and the reason why this model cannot be asked them."""
    try:
        encoded = [encode(model.tokenizer, Text(question.prompt)) for question in QUESTIONS[:count]]
        require_room(model, encoded, ANSWER_TOKENS)
    except RecipeError as error:  # the chat template changes one, or the model has too few positions
        return (), f"plain questions were not asked: {error.problems[0].removeprefix('data: ')}"
    return QUESTIONS[:count], ""


def measure_side_effects(
    context: Context,
    options: ValidateOptions,
    program: Program,
    evaluator: ContrastEvaluator,
    questions: Sequence[PlainQuestion],
) -> tuple[list[SideEffect], list[str]]:
    """Compare the steered model with the base on texts that have nothing to do with the behaviour.

    Args:
        evaluator: has the `questions`.

    Returns the side effects, and a remark on each that could not be measured.
    """
    model, measured, remarks = context.model, [], list[str]()

    def add(name: str, key: str, base: np.ndarray, steered: np.ndarray) -> None:
        lost, p = bootstrap_mean(base - steered, seed=context.seed), sign_flip(base - steered, context.seed)
        means, most = (float(base.mean()), float(steered.mean())), getattr(options.tolerances, key)
        measured.append(SideEffect(name, key, len(base), *means, lost, p, most))

    def both(prompts: Sequence[str], tokens: int) -> list[Answers]:
        requests = [Request(prompts, setting, scored=False) for setting in (None, program)]
        return answer(model, requests, lambda _replies: np.zeros(0), tokens)

    if questions:
        free = both([question.prompt for question in questions], ANSWER_TOKENS)
        correct = [[q.is_right(text) for q, text in zip(questions, side.texts, strict=True)] for side in free]
        add("plain answers", "answers", *(np.array(side, dtype=float) for side in correct))
        right = evaluator.base_right, evaluator.right_answers(program)
        add("the likelihood of right answers", "right_answers", *right)

    instructions = _instructions(options.control_prompts)
    prompts = [text.prompt for text in context.data.neutral[: options.control_prompts]]
    try:
        base, steered = both([*prompts, *instructions], options.max_new_tokens)
    except RecipeError as error:
        return measured, [f"control prompts were not answered: {error.problems[0].removeprefix('data: ')}"]
    n = len(prompts)
    helped = [[_REFUSAL.search(text[:_START]) is None for text in side.texts[:n]] for side in (base, steered)]
    add("answers without a refusal", "refusals", *(np.array(side, dtype=float) for side in helped))
    # A text of too few small words has no language that could be told, and is taken for the same.
    known = [[languages(text, _SMALL_WORDS) for text in side.texts] for side in (base, steered)]
    same = np.array([not (own and after) or own == after for own, after in zip(*known, strict=True)], dtype=float)
    add("answers in the same language", "language", np.ones(len(same)), same)
    try:
        checks = Behaviour((), (), (), (), (), (), {}, checks=instructions)
        follows = IFEval(kind="ifeval").bind(model, checks)
    except RecipeError as error:
        remarks.append(f"the following of instructions was not measured: {error.problems[0]}")
    else:
        replies = [
            [Reply(prompt, text, True) for prompt, text in zip(instructions, side.texts[n:], strict=True)]
            for side in (base, steered)
        ]
        add("instructions followed", "instructions", *map(follows, replies))
    return measured, remarks


def _instructions(count: int) -> dict[str, tuple[Check, ...]]:
    """The package's prompts that can be checked without a model, with what a reply must satisfy."""
    rows = [row for _line, row in read_json_lines(TEXTS / "instructions.jsonl")]
    return {
        row["prompt"]: tuple(Check(check["id"], tuple(check["arguments"].items())) for check in row["checks"])
        for row in rows[:count]
    }
