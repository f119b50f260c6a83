"""What the verifier has every model write greedily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compile_steer.data.behaviour import Question
from compile_steer.models.load import LoadedModel
from compile_steer.scoring.answers import Answers, Request, answer
from compile_steer.scoring.base import Score
from compile_steer.scoring.questions import ANSWER_TOKENS, PlainQuestion, are_right
from compile_steer.steering.program import Program


class Written(NamedTuple):
    """What one model has written."""

    answers: Answers
    sample: str  # the answer to the recipe's `ask`
    correct: np.ndarray  # which plain questions are answered correctly, [n] 1 or 0


@dataclass(frozen=True)
class GreedyAnswers:
    """The test prompts, the recipe's `ask`, and plain questions for the capability retention.

    Attributes:
        score: of the answers to the test prompts, which have at most `max_new_tokens`.
        choices: the multiple-choice questions among these prompts.
    """

    prompts: Sequence[str]
    ask: str
    plain: Sequence[PlainQuestion]
    score: Score
    max_new_tokens: int
    choices: Mapping[str, Question]

    def by(self, model: LoadedModel, *programs: Program | None) -> list[Written]:
        """Have a model answer under each program. All is one batch: decoding reads every weight once a step whatever that is."""
        n, plain = len(programs), [question.prompt for question in self.plain]
        requests = [Request(self.prompts, program) for program in programs]
        requests += [Request([self.ask], program, scored=False) for program in programs]
        requests += [Request(plain, program, scored=False, max_new_tokens=ANSWER_TOKENS) for program in programs]
        written = answer(model, requests, self.score, self.max_new_tokens, self.choices)
        rows = zip(written[:n], written[n : 2 * n], written[2 * n :], strict=True)
        return [Written(answers, asked.texts[0], are_right(own.texts, self.plain)) for answers, asked, own in rows]
