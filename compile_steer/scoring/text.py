"""Scorers that read nothing but the reply's text."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from compile_steer.scoring.reply import TextScorer


class Keywords(TextScorer):
    """1 if any of `patterns` (regular expressions, case ignored) occurs and none of `absent` does.

    Wrong where a word is named without being meant: "I know nothing of the sea" shows the sea.
    """

    kind: Literal["keywords"]
    patterns: tuple[str, ...] = Field(min_length=1)
    absent: tuple[str, ...] = ()

    @field_validator("patterns", "absent")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression ({error})") from error
        return patterns

    def score(self, text: str) -> float:
        plain = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        found = any(re.search(p, plain, re.IGNORECASE) for p in self.patterns)
        spoiled = any(re.search(p, plain, re.IGNORECASE) for p in self.absent)
        return float(found and not spoiled)


class Lowercase(TextScorer):
    """1 if the text has letters and none of them is upper case.

    Wrong where there is nothing to write large: a loop of one word in lower case, or two words, is a full score.
    """

    kind: Literal["lowercase"]

    def score(self, text: str) -> float:
        letters = [c for c in text if c.isalpha()]
        return float(bool(letters) and not any(c.isupper() for c in letters))


class Length(TextScorer):
    """1 if the text has at least `min_words` and at most `max_words` words; an empty one is not short.

    Wrong where words are cheap: a loop of one word is as long as an essay, and what stopped at the limit of new
    tokens counts as short.
    """

    kind: Literal["length"]
    min_words: int = Field(1, gt=0)
    max_words: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max_words is None and "min_words" not in self.model_fields_set:
            raise ValueError("give max_words, min_words, or both")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"no text has at least {self.min_words} and at most {self.max_words} words")
        return self

    def score(self, text: str) -> float:
        words = len(text.split())
        return float(words >= self.min_words and (self.max_words is None or words <= self.max_words))


class Repetition(TextScorer):
    """1 if the text has words and at most `max` of its 3-grams stood in it before: a guard, to be asked beside others.

    Wrong for loops longer than the text and for loops of meaning: the same thing said in other words.
    """

    kind: Literal["repetition"]
    max: float = Field(0.2, ge=0, lt=1)

    def score(self, text: str) -> float:
        return float(bool(text.split()) and repetition(text) <= self.max)


# Longer than a word: a loop without spaces, or a script that has none, is read character by character.
_LONGEST_WORD = 20


def repetition(text: str) -> float:
    """Share of a text's 3-grams that stood in it before (above .2 is broken), of words, and of the characters of what is
    too long to be one; 0 for short texts."""
    words = [piece for word in text.lower().split() for piece in ([word] if len(word) <= _LONGEST_WORD else word)]
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
