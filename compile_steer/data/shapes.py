"""Rows as people have them, brought to the keys that a kind of data reads.

Known are questions with an answer that matches a behaviour and one that does not (contrastive activation addition, and
the model-written evaluations), `chosen` and `rejected` of preference data, and lists of chat messages.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from string import ascii_uppercase
from typing import Any

from compile_steer.stats import LEVEL

PAIR, QUESTION = ("prompt", "positive", "negative"), ("question", "choices", "answer")
ANSWERS = ("answer_matching_behavior", "answer_not_matching_behavior")
_OTHER_NAMES = dict(zip(("question", *ANSWERS, "messages", "chosen", "rejected"), (*PAIR, *PAIR), strict=True))
_SHAPES: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {
    PAIR: (
        ("question", *ANSWERS),
        ("prompt", "chosen", "rejected"),
        ("messages", "chosen", "rejected"),
        ("messages", "positive", "negative"),
        ("chosen", "rejected"),
        ("positive", "negative"),
    ),
    QUESTION: (("question", *ANSWERS),),
    ("prompt", "response"): (("messages",),),
    ("prompt",): (("messages",),),
}
_LETTERED = re.compile(r"\n[ \t]*\(?([A-Z])[).:][ \t]+")
_REFERS = re.compile(
    r"\b(of the (above|below|others?)|of these|(both|either|neither) [A-Z]\b|[A-Z] (and|or|nor) [A-Z]\b)"
)
_LETTER = re.compile(r"\s*\(?([A-Z])\)?[.:]?\s*")


def known_shape(columns: Collection[str], keys: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the known shape that a row has in place of `keys`; () if it has these, or no known shape."""
    if set(keys) <= set(columns):
        return ()
    return next((shape for shape in _SHAPES.get(tuple(keys), ()) if set(shape) <= set(columns)), ())


def reshaped(row: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
    """Return the row under `keys`, as it is if it has no known shape; raises `ValueError` if it has one but is unusable.

    Of a row of another shape the columns that it does not need are left out. Lists of messages become a prompt, earlier
    turns (`history`), a system prompt and a response.
    """
    shape = known_shape(row, keys)
    if shape and tuple(keys) == QUESTION:
        return _question(*(row[name] for name in shape))
    renamed = {_OTHER_NAMES.get(name, name): row[name] for name in shape} or row
    talks = [key for key in (*PAIR, "response") if isinstance(renamed.get(key), list | tuple)]
    if talks and "prompt" in keys:
        return _from_messages(renamed, keys)
    return renamed if set(keys) <= set(renamed) else row


def _from_messages(row: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
    turns = _turns("prompt", row.get("prompt", []), "user")
    responses: dict[str, str] = {}
    for key in ("positive", "negative", "response"):
        if key in row:
            own = _turns(key, row[key], "assistant")
            *before, (role, responses[key]) = own or [("", "")]
            if role != "assistant":
                raise ValueError(f"{key} must end with a message of the assistant; found {role or 'no message'}.")
            if turns and before and before != turns:
                raise ValueError(f"{key} must answer the same messages as the rest of its row; found others.")
            turns = turns or before
    if turns and turns[-1][0] == "assistant":
        responses.setdefault("response", turns.pop()[1])
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    roles = [role for role, _text in turns]
    if not roles or roles != [("user", "assistant")[n % 2] for n in range(len(roles) | 1)]:
        raise ValueError(f"messages must take turns, user first and user last before the answer; found {roles}.")
    texts = [text for _role, text in turns]
    history = [list(turn) for turn in zip(texts[:-1:2], texts[1::2], strict=True)]
    if "positive" in keys and (history or system):
        raise ValueError(
            "a pair is one message of the user and two answers to it; found earlier turns or a system prompt. Leave them "
            "out; a system prompt of every pair is data.positive_system and data.negative_system."
        )
    values = {"prompt": texts[-1], **{key: text for key, text in responses.items() if key in keys}}
    return values | ({"history": history} if history else {}) | ({"system": system} if system else {})


def _turns(key: str, value: Any, role: str) -> list[tuple[str, str]]:
    """Return (role, text) of each message; a plain text is one message of `role`."""
    if isinstance(value, str):
        return [(role, value)]
    turns = []
    for message in value if isinstance(value, list | tuple) else [value]:
        who, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if isinstance(content, list):  # parts, as of models that see images
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
        if who not in ("system", "user", "assistant") or not isinstance(content, str):
            raise ValueError(
                f'{key} must be a text, or a list of {{"role": "user", "content": text}} with the roles system, user and '
                "assistant."
            )
        turns.append((str(who), content))
    return turns


def _question(question: Any, matching: Any, other: Any) -> Mapping[str, Any]:
    """Return question, choices and answer of a row of CAA; the choices may stand in the question's text, with letters."""
    if not all(isinstance(text, str) for text in (question, matching, other)):
        raise ValueError(f"question, {ANSWERS[0]} and {ANSWERS[1]} must be texts.")
    head, *lettered = _LETTERED.split(question)
    choices = [text.strip() for text in lettered[1::2]]
    if choices and lettered[::2] == list(ascii_uppercase[: len(choices)]):
        choices[-1] = re.sub(r"\s*Answer:$", "", choices[-1])
        letter = _LETTER.fullmatch(matching)
        answer = lettered[::2].index(letter[1]) if letter and letter[1] in lettered[::2] else matching.strip()
        return {"question": re.sub(r"\s*(Choices|Options):?$", "", head.strip()), "choices": choices, "answer": answer}
    if _LETTER.fullmatch(matching) and _LETTER.fullmatch(other):
        raise ValueError(
            f"{ANSWERS[0]} is the letter {matching.strip()}, but the question lists no choices with letters."
        )
    # In an order of their own, so that the place of a choice does not say which of them matches.
    choices = sorted([matching.strip(), other.strip()])
    return {"question": question, "choices": choices, "answer": choices.index(matching.strip())}


def unbalanced(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one letter is right in all rows, or more often than chance explains (binomial test, 5 %).

    Choices that name each other ("all of the above") keep their order, whatever their letters.
    """
    from scipy.stats import binomtest

    right = [choice for row in rows if (choice := right_choice(row)) is not None]
    if len(right) < 2 or any(_REFERS.search(choice) for row in rows for choice in row["choices"]):
        return False
    most, chance = max(map(right.count, right)), 1 / max(len(row["choices"]) for row in rows)
    return most == len(right) or bool(binomtest(most, len(right), chance).pvalue <= LEVEL)


def right_choice(row: Mapping[str, Any]) -> int | None:
    """Return the index of a question's right choice; None if there is no such choice."""
    answer, choices = row["answer"], [choice.strip() for choice in row["choices"]]
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    return choices.index(answer.strip()) if answer.strip() in choices else None


def turned(row: Any, n: int) -> Any:
    """Return the row with its choices in a cycle, the right one at place `n` of it; as it is if it has no answer."""
    right, choices = right_choice(row), row["choices"]
    by = (right or 0) - n % len(choices)
    turned = copy(row)  # with its place
    turned |= {"choices": [*choices[by:], *choices[:by]], "answer": n % len(choices)}
    return row if right is None else turned
