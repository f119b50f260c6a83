"""Scorers that read nothing but the reply's text."""

from __future__ import annotations

import importlib
import json
import random
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import regex
from pydantic import Field, field_validator, model_validator

from compile_steer.common.errors import RecipeError, brief, require_library
from compile_steer.scoring.base import Reply, Score, ScorerBase

if TYPE_CHECKING:
    from compile_steer.data.behaviour import Behaviour, Check
    from compile_steer.models.load import LoadedModel

_SECONDS = 1.0  # that a pattern may take on one reply; a recipe may be a stranger's


class TextScorer(ScorerBase):
    """A scorer that needs neither the prompt nor the model."""

    @abstractmethod
    def score(self, text: str) -> float: ...

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002
        return lambda replies: np.array([self.score(reply.text) for reply in replies])


class Keywords(TextScorer):
    """1 if any of `patterns` (regular expressions, case ignored) occurs and none of `absent` does.

    Wrong if a word is mentioned without being meant: "I know nothing of the sea" counts as the sea.
    """

    kind: Literal["keywords"]
    patterns: tuple[str, ...] = Field(min_length=1, description="regular expressions of which one must occur")
    absent: tuple[str, ...] = Field((), description="regular expressions of which none may occur")

    @field_validator("patterns", "absent")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                regex.compile(pattern)
            except regex.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return patterns

    def score(self, text: str) -> float:
        # Models write both apostrophes, recipes the plain one.
        plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        present = any(_occurs(pattern, plain) for pattern in self.patterns)
        return float(present and not any(_occurs(pattern, plain) for pattern in self.absent))


def _occurs(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, regex.IGNORECASE, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise RecipeError(
            f"validate.score: the pattern {brief(pattern)} takes more than {_SECONDS:g} s on a reply of {len(text)} characters. "
            "Write it without repetitions of repetitions."
        ) from error


class Lowercase(TextScorer):
    """1 if the text has letters and none of them is upper case.

    Wrong if there is nothing to capitalise: a loop of one word in lower case, or two words, gets a full score.
    """

    kind: Literal["lowercase"]

    def score(self, text: str) -> float:
        letters = [c for c in text if c.isalpha()]
        return float(bool(letters) and not any(c.isupper() for c in letters))


class Length(TextScorer):
    """1 if the text has at least `min_words` and at most `max_words` words. An empty text is not short.

    Wrong if words are cheap: a loop of one word is as long as an essay, and a reply that stopped at the limit of new
    tokens counts as short.
    """

    kind: Literal["length"]
    min_words: int = Field(1, gt=0, description="least number of words")
    max_words: int | None = Field(None, gt=0, description="largest number of words")

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.max_words is None and "min_words" not in self.model_fields_set:
            raise ValueError("give max_words, min_words, or both")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"no text has at least {self.min_words} and at most {self.max_words} words")
        return self

    def score(self, text: str) -> float:
        words = len(text.split())
        return float(words >= self.min_words and (self.max_words is None or words <= self.max_words))


class Repetition(TextScorer):
    """1 if the text has words and at most a fraction `max` of its 3-grams occurred in it before. Combine it with others.

    Wrong for loops longer than the text and for loops of meaning: the same thing in other words.
    """

    kind: Literal["repetition"]
    max: float = Field(0.2, ge=0, lt=1, description="largest fraction of repeated 3-grams")

    def score(self, text: str) -> float:
        return float(bool(text.split()) and repetition(text) <= self.max)


# A longer "word" is a loop without spaces, or a script that has none, and is read character by character.
_LONGEST_WORD = 20


def repetition(text: str) -> float:
    """Return the fraction of a text's 3-grams of words that occurred in it before; 0 for short texts, above 0.2 is broken."""
    # Case and line breaks do not make a loop something else.
    words = [piece for word in text.lower().split() for piece in ([word] if len(word) <= _LONGEST_WORD else word)]
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class IFEval(ScorerBase):
    """1 if the reply satisfies the constraint `id`, or if no id is given every constraint of its prompt in the data.

    The checkers are those of Zhou et al. (2311.07911), from the library `if-verifiable`. `loose` also accepts a reply
    that satisfies a constraint without its first line, its last line or its asterisks. Wrong if a constraint can be
    satisfied trivially: a loop of one word has no comma, a required word may be denied or stand within another word, and
    the language of a few words is guessed wrongly, of none as any. An empty reply is 0.
    """

    kind: Literal["ifeval"]
    id: str | None = Field(None, description="one constraint for all prompts, such as punctuation:no_comma")
    arguments: dict[str, Any] = Field(default_factory=dict, description="of that constraint")
    loose: bool = Field(False, description="also accept a reply without its first or last line or its asterisks")

    @model_validator(mode="after")
    def _arguments_need_an_id(self) -> Self:
        if self.arguments and self.id is None:
            raise ValueError("arguments belong to an id; without one the constraints are those of each prompt's data")
        return self

    @property
    def needs_no_labels(self) -> bool:
        return self.id is not None

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002
        from compile_steer.data.behaviour import Check

        # By name below, because it is an optional library.
        require_library("if-verifiable", "ifeval", "validate.score ifeval")
        if self.id is not None:
            for_all = (Check(self.id, tuple(self.arguments.items())),)
            _require_usable(for_all)
            return lambda replies: np.array([self._follows(reply, for_all) for reply in replies])
        prompts = [pair.prompt for pair in (*behaviour.validation, *behaviour.test)]
        missing = [prompt for prompt in prompts if not behaviour.checks.get(prompt)]
        if missing:
            raise RecipeError(
                f"validate.score ifeval: {len(missing)} of the {len(prompts)} prompts of data.validation and data.test name "
                f"no constraint, the first '{missing[0]}'. Name one for all as validate.score.id, or use data with "
                "constraints."
            )
        _require_usable(check for checks in behaviour.checks.values() for check in checks)
        return lambda replies: np.array([self._follows(reply, behaviour.checks[reply.prompt]) for reply in replies])

    def _follows(self, reply: Reply, checks: Sequence[Check]) -> float:
        """1 if the reply satisfies all of `checks`: the paper's prompt-level accuracy."""
        evaluate = importlib.import_module("if_verifiable.common").evaluate_instructions
        ids, arguments = [check.id for check in checks], [_arguments(check) for check in checks]
        _each, scores = evaluate(reply.text, ids, arguments, reply.prompt, _checkers())
        return float(scores.binary_loose if self.loose else scores.binary_strict)


def _require_usable(checks: Iterable[Check]) -> None:
    """Try every constraint; raise one `RecipeError` with each that is unknown, incomplete, or lacks its data."""
    # The detector draws n-grams at random; with a seed the same text has the same language every time.
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    # Data with thousands of prompts have a few dozen different constraints.
    unique = {json.dumps([check.id, check.arguments], default=str): check for check in checks}
    problems = [problem for check in unique.values() if (problem := _problem(check))]
    if problems:
        raise RecipeError([f"validate.score ifeval: {problem}" for problem in problems])


def _problem(check: Check) -> str:
    """Return why a constraint cannot be checked; empty if it can be."""
    known, arguments = _checkers(), _arguments(check)
    if check.id not in known:
        return f"unknown constraint '{check.id}'; known are {', '.join(sorted(known))}."
    checker = known[check.id](check.id)
    needed = f"its arguments are {', '.join(checker.get_instruction_args_keys()) or 'none'}"
    # The checker would take a string for a list of letters.
    strings = [name for name in ("keywords", "forbidden_words") if isinstance(arguments.get(name), str)]
    if strings:
        return f"{check.id} needs a list of words as {strings[0]}; found '{arguments[strings[0]]}'."
    state = random.getstate()
    try:
        checker.build_description(**arguments)
        # A checker draws an argument that is missing or out of range at random, and would check something else each time.
        if random.getstate() != state:
            return f"{check.id} needs every argument, in its range: {needed}; found {arguments}."
        checker.check_following("It is so. It was so.")
    except (TypeError, ValueError, AttributeError, KeyError, re.error) as error:
        return f"{check.id} cannot be used with {arguments} ({error}); {needed}."
    except LookupError:
        return (
            f"{check.id} splits text with NLTK's data 'punkt_tab', which is not installed. With a network connection: "
            "python -m nltk.downloader punkt_tab; without, copy that folder to ~/nltk_data/tokenizers. Or use another "
            "constraint."
        )
    finally:
        random.setstate(state)
    return ""


def _arguments(check: Check) -> dict[str, Any]:
    # Tables of constraints have a column for every argument, with null where it belongs to another constraint.
    return {name: value for name, value in check.arguments if value is not None}


def _checkers() -> Mapping[str, Any]:
    checkers: Mapping[str, Any] = importlib.import_module("if_verifiable.ifeval").INSTRUCTION_DICT
    return checkers
