"""What each key of a row must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_CHOICES = 26
"""As many as there are letters."""


@dataclass(frozen=True)
class Field:
    """A test of a value, and what it asks for in words."""

    holds: Callable[[object], bool]
    needed: str


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_history(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(_is_text(said) for said in turn) for turn in value
    )


def _are_choices(value: object) -> bool:
    if not isinstance(value, list) or not all(_is_text(choice) for choice in value):
        return False
    return 2 <= len({choice.strip() for choice in value}) == len(value) <= MAX_CHOICES


def _is_answer(value: object) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


def _are_checks(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(check, dict)
        and set(check) <= {"id", "arguments"}
        and _is_text(check.get("id"))
        and isinstance(check.get("arguments", {}), dict | None)
        for check in value
    )


_TEXT = Field(_is_text, "text that is not empty")
FIELDS = {
    **dict.fromkeys(("prompt", "positive", "negative", "response", "question", "instruction"), _TEXT),
    "history": Field(_is_history, "a list of [user, assistant] pairs of texts that are not empty"),
    "choices": Field(_are_choices, f"a list of 2 to {MAX_CHOICES} texts, no two the same"),
    "answer": Field(_is_answer, "the right choice's number, from 0 on, or its text"),
    "checks": Field(_are_checks, 'a list of objects {"id": text, "arguments": {...}}'),
}
