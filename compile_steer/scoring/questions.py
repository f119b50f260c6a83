"""Short questions with one right answer: what steering and compiling cost besides the behaviour.

Multiple choice misses what breaks first: a model that still ranks the right letter first may no longer say it, so the
questions are answered freely. They are few and our own: they show damage, not ability.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.common.reading import read_json_lines
from compile_steer.data.section import TEXTS
from compile_steer.models.text import Text

ANSWER_TOKENS = 12  # the longest right answer has five words
_WRONG = 5  # wrong answers beside the right one


@dataclass(frozen=True)
class PlainQuestion:
    """A question and its right answers: one of them as whole words anywhere in the reply, in any case.

    Where the answer is one of several words, `choices`, it must be the first of them in the reply.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""

    def is_right(self, reply: str) -> bool:
        words = "|".join(re.escape(word) for word in self.choices or self.answers)
        first = re.search(rf"(?<!\w)({words})(?!\w)", reply, re.IGNORECASE)
        return first is not None and first[1].lower() in {answer.lower() for answer in self.answers}


def _read() -> tuple[PlainQuestion, ...]:
    rows = (row for _line, row in read_json_lines(TEXTS / "questions.jsonl"))
    return tuple(
        PlainQuestion(row["prompt"], tuple(row["answers"]), tuple(row.get("choices", ())), row["kind"]) for row in rows
    )


# Four kinds in turn, so that the first few are of every kind: sums, copying, capitals, yes or no.
QUESTIONS = _read()


def answer_texts(question: PlainQuestion) -> list[Text]:
    """The question with its right answer, then with wrong ones: right answers of the next questions of its kind."""
    at = QUESTIONS.index(question)
    others = [other for other in QUESTIONS[at:] + QUESTIONS[:at] if other.kind == question.kind]
    words = [word for other in others for word in other.choices or other.answers[:1] if word not in question.answers]
    return [Text(question.prompt, word) for word in (question.answers[0], *list(dict.fromkeys(words))[:_WRONG])]


def right_answers(logprobs: np.ndarray, questions: Sequence[PlainQuestion]) -> np.ndarray:
    """How much of the likelihood of right and wrong answers is the right one's: [n_questions] in 0 to 1.

    Args:
        logprobs: of `answer_texts` of all questions, mean over tokens, in nats.
    """
    ends = np.cumsum([len(answer_texts(question)) for question in questions])
    parts = np.split(logprobs, ends[:-1]) if questions else []
    return np.array([1 / np.exp(part - part[0]).sum() for part in parts])


def are_right(replies: Sequence[str], questions: Sequence[PlainQuestion]) -> np.ndarray:
    """Which replies to as many questions are right: [n_questions], 1 or 0."""
    return np.array([float(question.is_right(reply)) for reply, question in zip(replies, questions, strict=True)])
