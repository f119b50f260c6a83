"""One side of the pairs: answers that show the behaviour, or that do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compile_steer.common.progress import Advance
from compile_steer.data.section import GenerateOptions
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.text import repetition

_SHOWS = 0.5
_ROWS = 96
# A full stop after a digit may be a list's number, and what comes next would be an item without a text.
_WHOLE = re.compile(r"(?<!\d)[.!?]+[\"')\]*]*(?=\s|$)|\n")


@dataclass(frozen=True)
class Answer:
    """What a prompt's side came to: the text if it can be used, or else `problem` with the last text seen."""

    text: str
    problem: str = ""


@dataclass(frozen=True)
class Side:
    """What the model is asked for one side of each pair, [n], and whether the answers must show the behaviour."""

    name: str
    asked: Sequence[Text]
    shows: bool


def write_side(
    loaded: LoadedModel,
    side: Side,
    prompts: Sequence[str],
    score: Score,
    options: GenerateOptions,
    seed: int,
    advance: Advance,
) -> tuple[list[Answer], int]:
    """Answer each text of a side until one answer can be used or all tries are spent; and how many were written.

    The first try is greedy, the others are sampled at `options.temperature`; only what failed is asked again.

    Args:
        prompts: the plain prompts [n], which scorers know the texts by.
    """
    found: dict[int, Answer] = {}
    written = 0
    for attempt in range(options.tries):
        left = [n for n in range(len(prompts)) if n not in found or found[n].problem]
        for at in range(0, len(left), _ROWS):
            rows = left[at : at + _ROWS]
            encoded = continue_prompts(
                loaded,
                [side.asked[n] for n in rows],
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature if attempt else 0.0,
                seed=seed + attempt,
            )
            ends = [ended(loaded, one) for one in encoded]
            texts = [response_text(loaded, one) for one in encoded]
            whole = [text if end else cut(text) for text, end in zip(texts, ends, strict=True)]
            shown = score([Reply(prompts[n], text, end) for n, text, end in zip(rows, whole, ends, strict=True)])
            for n, text, kept, value in zip(rows, texts, whole, shown, strict=True):
                problem = _problem(side, kept, float(value), options)
                found[n] = Answer(kept or text, problem)
            written += len(rows)
            advance(len(rows))
    return [found[n] for n in range(len(prompts))], written


def cut(text: str) -> str:
    """A text that was stopped midway, up to its last whole sentence or line; empty if it has none."""
    ends = [found.end() for found in _WHOLE.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def _problem(side: Side, text: str, score: float, options: GenerateOptions) -> str:
    """Why an answer cannot be used, or nothing."""
    if not text:
        return f"{side.name}: no whole sentence within {options.max_new_tokens} tokens"
    if side.shows and score < _SHOWS:
        return f"{side.name} does not show the behaviour"
    if not side.shows and score >= _SHOWS:
        return f"{side.name} shows the behaviour"
    if repetition(text) > options.max_repetition:
        return f"{side.name} repeats itself"
    return ""
