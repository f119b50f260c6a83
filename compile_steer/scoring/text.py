"""Scorers that read nothing but the reply's text."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from compile_steer.scoring.reply import TextScorer


class Keywords(TextScorer):
    """1 if any of `patterns` (regular expressions, case ignored) occurs and none of `absent` does."""

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
    """1 if the text has letters and none of them is upper case."""

    kind: Literal["lowercase"]

    def score(self, text: str) -> float:
        letters = [c for c in text if c.isalpha()]
        return float(bool(letters) and not any(c.isupper() for c in letters))


class Length(TextScorer):
    """1 if the text has at least one and at most `max_words` words."""

    kind: Literal["length"]
    max_words: int = Field(gt=0)

    def score(self, text: str) -> float:
        return float(1 <= len(text.split()) <= self.max_words)


def repetition(text: str) -> float:
    """Share of a text's word 3-grams that stood in it before (above .2 is broken); 0 for short texts."""
    words = text.lower().split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
