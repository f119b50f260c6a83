"""Labelled multiple choice: the right letter against a wrong one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from string import ascii_uppercase
from typing import Literal

from compile_steer.artifacts.files import digest
from compile_steer.data.behaviour import SPLITS, Question
from compile_steer.data.section import DataSection, Rows, fill, template_problems
from compile_steer.data.sources import Row
from compile_steer.models.text import Pair, Text


class Choices(DataSection):
    """Rows {"question", "choices": [...], "answer": its number from 0 on, or its text}.

    The prompt is the question with its choices lettered in their order; the responses are letters.
    """

    kind: Literal["choices"]
    question_template: str = "{question}\n{choices}\nAnswer with the letter only."
    keys = ("question", "choices", "answer")

    def subject(self, row: Row) -> str:
        """The question with its choices in no order: put otherwise it is still the same question."""
        return " | ".join([row["question"], *sorted(row["choices"])])

    def problems(self, rows: Rows) -> Iterator[str]:
        yield from template_problems("question_template", self.question_template, "{question}", "{choices}")
        for name in SPLITS:
            answers = [(row, _answer(row)) for row in rows[name]]
            lost = [row for row, answer in answers if answer is None]
            if lost:
                yield (
                    f"data.{name}: the answer of {len(lost)} of {len(answers)} rows is none of its choices, as "
                    f"{lost[0]['answer']!r} of {lost[0]['choices']} (question '{lost[0]['question']}'). Needed: a number "
                    f"from 0 to {len(lost[0]['choices']) - 1}, or the text of a choice."
                )
            letters = Counter(ascii_uppercase[answer] for _row, answer in answers if answer is not None)
            if len(letters) == 1:
                (letter,) = letters
                yield (
                    f"data.{name}: the right answer is {letter} in every row ({letters[letter]}), so that the letter alone "
                    "tells right from wrong. Change the order of the choices from row to row."
                )

    def pair(self, row: Row) -> Pair:
        question = self._question(row)
        right = question.letters[question.answer]
        return Pair(Text(question.prompt, right), Text(question.prompt, _wrong(question)), question.prompt)

    def questions(self, rows: Rows) -> Mapping[str, Question]:
        found = [self._question(row) for name in SPLITS for row in rows[name]]
        return {question.prompt: question for question in found}

    def _question(self, row: Row) -> Question:
        letters = tuple(ascii_uppercase[: len(row["choices"])])
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
        answer = _answer(row)
        if answer is None:
            raise ValueError(f"no choice is the answer of {row}")
        return Question(fill(self.question_template, question=row["question"], choices=listed), letters, answer)


def _answer(row: Row) -> int | None:
    """The number of the right choice; None if there is no such choice."""
    answer, choices = row["answer"], row["choices"]
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    said = [choice.strip() for choice in choices]
    return said.index(answer.strip()) if answer.strip() in said else None


def _wrong(question: Question) -> str:
    """A wrong letter, drawn by the question itself: any of them over the rows, the same for one row every time."""
    wrong = [letter for n, letter in enumerate(question.letters) if n != question.answer]
    return wrong[int(digest(question.prompt), 16) % len(wrong)]
