"""The four kinds of rows of a recipe's `data` section, each of which reads itself into a `Behaviour`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import brief
from compile_steer.data.behaviour import SIDES, SPLITS, Check, Question, shared_texts
from compile_steer.data.section import DataSection, GenerateOptions, Rows
from compile_steer.data.shapes import PAIR, QUESTION, right_choice, turned, unbalanced
from compile_steer.data.sources import Row
from compile_steer.data.templates import fill, template_problems
from compile_steer.models.text import Pair, Text


class _TwoTemplates(DataSection):
    """Each side of a pair has its own prompt: "{prompt} Answer in lowercase." and "{prompt}", for example.

    `{prompt}` stands for the row's prompt, which is what validation and verification measure.
    """

    positive_template: str = Field("{prompt}", description="the prompt of the positive side")
    negative_template: str = Field("{prompt}", description="the prompt of the negative side")
    positive_system: str = Field("", description="the system prompt of the positive side")
    negative_system: str = Field("", description="the system prompt of the negative side")

    @property
    def same_prompt(self) -> bool:
        """True if both sides have the same prompt."""
        pair = self.pair(Row(prompt="{prompt}"))
        return pair.positive == pair.negative

    def pair(self, row: Row) -> Pair:
        def side(name: str) -> Text:
            prompt = fill(getattr(self, f"{name}_template"), prompt=row["prompt"])
            return Text(prompt, row.get(name, ""), system=getattr(self, f"{name}_system"))

        return Pair(side("positive"), side("negative"), row["prompt"])

    def problems(self, rows: Rows) -> Iterator[str]:  # noqa: ARG002  (of the templates alone)
        for name in ("positive_template", "negative_template"):
            yield from template_problems(name, getattr(self, name), "{prompt}")


class PairsData(_TwoTemplates):
    """Rows {"prompt", "positive", "negative"}; no response may be in two splits."""

    kind: Literal["pairs"] = "pairs"
    keys = PAIR

    def problems(self, rows: Rows) -> Iterator[str]:
        sides = {name: [(row[side], row.place) for row in rows[name] for side in SIDES] for name in SPLITS}
        texts, places = ({name: [found[n] for found in part] for name, part in sides.items()} for n in (0, 1))
        yield from shared_texts("response", texts, places)
        yield from super().problems(rows)
        for name in SPLITS:
            same = [row for row in rows[name] if row["positive"].strip() == row["negative"].strip()]
            if same and self.same_prompt:
                example = f"{brief(same[0]['prompt'])} ({same[0].place}; {len(same)} pairs)"
                yield f"data.{name}: positive and negative are the same text for {example}."


class GeneratedData(_TwoTemplates):
    """Rows {"prompt"}: the model responds to each with either side's template and system prompt.

    A pair is kept only if the recipe's scorer finds the behaviour on the positive side alone.
    """

    kind: Literal["generated"]
    generate: GenerateOptions = GenerateOptions()
    keys = ("prompt",)

    def problems(self, rows: Rows) -> Iterator[str]:
        yield from super().problems(rows)
        if self.same_prompt:
            yield (
                "data: both sides have the same prompt, so the model would give both the same response. Set "
                "positive_template (for example '{prompt} Answer as a pirate.') or positive_system."
            )


class InstructionsData(DataSection):
    """Rows {"prompt", "instruction"}: the positive prompt ends in the instruction (Stolfo et al. 2410.12877).

    `checks`, if a row has any, are what a response must satisfy: [{"id": ..., "arguments": {...}}]. The model
    generates the responses.
    """

    kind: Literal["instructions"]
    generate: GenerateOptions = GenerateOptions()
    keys = ("prompt", "instruction")
    optional = ("checks",)

    def pair(self, row: Row) -> Pair:
        return Pair(Text(f"{row['prompt']} {row['instruction']}"), Text(row["prompt"]), row["prompt"])

    def labels(self, rows: Rows) -> dict[str, Any]:
        def check(value: Row) -> Check:
            arguments = sorted((value.get("arguments") or {}).items())
            # In a table every row has every column: a null argument is none.
            return Check(value["id"], tuple((name, argument) for name, argument in arguments if argument is not None))

        checked = [row for name in SPLITS for row in rows[name] if row.get("checks")]
        return {"checks": {row["prompt"]: tuple(map(check, row["checks"])) for row in checked}}


class ChoicesData(DataSection):
    """Rows {"question", "choices": [...], "answer": its number from 0 on, or its text}.

    The prompt is the question with its choices, lettered in their order; the responses are letters.
    """

    kind: Literal["choices"]
    question_template: str = Field(
        "{question}\n{choices}\nAnswer with the letter only.", description="how a question and its choices are asked"
    )
    balance_letters: bool | None = Field(
        None,
        description="turn the choices so that each letter is right equally often; left out: where one is too often",
    )
    keys = QUESTION
    rearranged = (
        "the choices were turned so that each letter is right equally often (data.balance_letters: false leaves them)"
    )

    def arranged(self, rows: Sequence[Row]) -> Sequence[Row]:
        turn = unbalanced(rows) if self.balance_letters is None else self.balance_letters
        return [turned(row, n) for n, row in enumerate(rows)] if turn else rows

    def subject(self, row: Row) -> str:
        # The same question with its choices in another order is still the same question.
        return " | ".join([row["question"], *sorted(row["choices"])])

    def problems(self, rows: Rows) -> Iterator[str]:
        yield from template_problems("question_template", self.question_template, "{question}", "{choices}")
        for name in SPLITS:
            answers = [right_choice(row) for row in rows[name]]
            if None in answers:
                row = rows[name][answers.index(None)]
                yield (
                    f"data.{name}: the answer of {answers.count(None)} of {len(answers)} rows is none of its choices, for "
                    f"example {brief(row['answer'])} of {brief(row['choices'])} ({row.place}, question "
                    f"{brief(row['question'])}). Needed: a number from 0 to {len(row['choices']) - 1}, or the text of a choice."
                )
            right = [ascii_uppercase[answer] for answer in answers if answer is not None]
            if len(set(right)) == 1:
                yield (
                    f"data.{name}: the right answer is {right[0]} in every row ({len(right)}), so that the letter alone "
                    "separates right from wrong. Leave out data.balance_letters, or change the choices' order."
                )

    def pair(self, row: Row) -> Pair:
        question = self._question(row)
        wrong = [letter for n, letter in enumerate(question.letters) if n != question.answer]
        # Drawn by the question itself: over the rows any wrong letter, for one row always the same.
        drawn = wrong[int(digest(question.prompt), 16) % len(wrong)]
        right = question.letters[question.answer]
        return Pair(Text(question.prompt, right), Text(question.prompt, drawn), question.prompt)

    def labels(self, rows: Rows) -> dict[str, Any]:
        questions = [self._question(row) for name in SPLITS for row in rows[name]]
        return {"questions": {question.prompt: question for question in questions}}

    def _question(self, row: Row) -> Question:
        letters = tuple(ascii_uppercase[: len(row["choices"])])
        choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
        prompt = fill(self.question_template, question=row["question"], choices=choices)
        return Question(
            prompt, letters, right_choice(row) or 0, tuple(row["choices"])
        )  # one without an answer was refused


def _kind(value: Any) -> str:
    """Return the kind that a section names, 'pairs' if it names none."""
    return str(value.get("kind", "pairs") if isinstance(value, dict) else getattr(value, "kind", "pairs"))


Data = Annotated[
    Annotated[PairsData, Tag("pairs")]
    | Annotated[ChoicesData, Tag("choices")]
    | Annotated[InstructionsData, Tag("instructions")]
    | Annotated[GeneratedData, Tag("generated")],
    Discriminator(_kind),
]
