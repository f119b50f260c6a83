"""The recipe's `data` section: four kinds of rows, each of which reads itself into a `Behaviour`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import RecipeError, brief, several
from compile_steer.common.options import Section
from compile_steer.data.behaviour import (
    SIDES,
    SPLITS,
    Behaviour,
    Check,
    Question,
    normalized,
    repeated_prompts,
    shared_texts,
)
from compile_steer.data.shapes import PAIR, QUESTION, right_choice, turned, unbalanced
from compile_steer.data.sources import MAX_LINES, Reader, Row, Source, text_of
from compile_steer.data.templates import fill, template_problems
from compile_steer.models.text import Pair, Text

Rows = Mapping[str, Sequence[Row]]
# The keys that a row of these parts must have, and those that it may have.
_PROMPT = (("prompt",), ("history", "system"))
_TEXT_KEYS = {"neutral": (("prompt", "response"), _PROMPT[1]), "heldout": _PROMPT, "calibration": _PROMPT}
_PARTS = (*SPLITS, *_TEXT_KEYS)
TEXTS = Path(__file__).parent / "texts"  # general texts and prompts, for a behaviour that brings none of its own


class GenerateOptions(Section):
    """How the model generates both sides of its pairs, and how many pairs are needed."""

    max_new_tokens: int = Field(
        48, ge=4, le=100_000, description="a longer response is cut after its last whole sentence"
    )
    tries: int = Field(1, ge=1, description="attempts at a response: the first greedy, the others sampled")
    temperature: float = Field(0.7, gt=0, description="of the sampled attempts")
    max_repetition: float = Field(0.2, gt=0, lt=1, description="largest fraction of repeated 3-grams")
    min_pairs: int = Field(16, ge=4, description="number of pairs that every split must have in the end")


class DataSection(Section, ABC):
    """The recipe's `data`: a JSONL file beside the recipe, or a data set, for each of six parts.

    Each split has its own source, whatever the kind. The splits of one data set are parts of it: `split: 'train[:60%]'`.
    """

    keys: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    rearranged: ClassVar[str] = ""  # what `arranged` does to rows that it changes

    train: Source = Field(description="rows that the direction is found from")
    validation: Source = Field(description="rows that layer and coefficient are chosen on")
    test: Source = Field(description="rows that the chosen program is measured on, once")
    neutral: Source | None = Field(
        None, description="control texts (prompt, response); by default those of the package"
    )
    heldout: Source | None = Field(None, description="prompts for verification alone; by default those of the package")
    calibration: Source | None = Field(
        None, description="prompts whose steered continuations a compile is fitted to; by default those of the package"
    )

    @property
    def generation(self) -> GenerateOptions | None:
        """How the model generates the responses; None where the rows have them."""
        return getattr(self, "generate", None)

    def read(self, folder: Path) -> Behaviour:
        """Read and check all data, with paths relative to `folder`; raises one `RecipeError` with every problem.

        Responses that the model is to generate are empty.
        """
        reader = Reader(folder)
        rows = {name: reader.rows(*self._row_args(name)) for name in _PARTS}
        splits = {name: self.arranged(rows[name]) for name in SPLITS}
        prompts = {name: [self.subject(row) for row in part] for name, part in splits.items()}
        # Of the package's own texts those are left out whose prompt the recipe's data have.
        named = [
            *prompts.values(),
            *([row["prompt"] for row in rows[name]] for name in _TEXT_KEYS if getattr(self, name)),
        ]
        taken = {normalized(prompt) for part in named for prompt in part}
        for name in _TEXT_KEYS:
            if getattr(self, name) is None:
                rows[name] = [row for row in rows[name] if normalized(row["prompt"]) not in taken]
        texts = {name: rows[name] for name in _TEXT_KEYS}
        prompts |= {name: [row["prompt"] for row in part] for name, part in texts.items()}
        places = {name: [row.place for row in part] for name, part in rows.items()}
        repeated, unusable = list(repeated_prompts(prompts, places)), list(self.problems(splits))
        if problems := [*reader.problems, *several(repeated, MAX_LINES), *several(unusable, MAX_LINES)]:
            raise RecipeError(problems)
        parts: dict[str, Any] = {name: tuple(map(self.pair, part)) for name, part in splits.items()}
        parts |= {name: tuple(map(text_of, part)) for name, part in texts.items()}
        notes = tuple(f"data.{name}: {self.rearranged}" for name in SPLITS if splits[name] is not rows[name])
        return Behaviour(**parts, hashes=reader.hashes, places=places, notes=notes, **self.labels(splits))

    @property
    def files(self) -> dict[str, Path]:
        """The sources that are files, by part, relative to the recipe."""
        return {name: source for name in _PARTS if isinstance(source := getattr(self, name), Path)}

    def hashes(self, folder: Path) -> tuple[dict[str, str], list[str]]:
        """Return the SHA-256 of the rows of each file that exists, as `read` records them, and the rows' problems."""
        reader = Reader(folder)
        for name, source, *keys in map(self._row_args, _PARTS):
            if isinstance(source, Path) and (folder / source).is_file():
                reader.rows(name, source, *keys)
        return reader.hashes, reader.problems

    def _row_args(self, name: str) -> tuple[str, Source, tuple[str, ...], tuple[str, ...]]:
        """The arguments of `Reader.rows` for a part."""
        source: Source | None = getattr(self, name)
        return name, source or TEXTS / f"{name}.jsonl", *_TEXT_KEYS.get(name, (self.keys, self.optional))

    def arranged(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Return the rows of a split as they are used."""
        return rows

    def subject(self, row: Row) -> str:
        """Return what must differ between any two rows."""
        return str(row["prompt"])

    def problems(self, rows: Rows) -> Iterator[str]:  # noqa: ARG002  (most kinds have some)
        """Yield a line for everything in the splits' rows that this kind cannot use."""
        yield from ()

    @abstractmethod
    def pair(self, row: Row) -> Pair: ...

    def labels(self, rows: Rows) -> dict[str, Any]:  # noqa: ARG002  (most kinds have none)
        """Return what `Behaviour` holds of the prompts besides the pairs: its `questions`, or its `checks`."""
        return {}


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
