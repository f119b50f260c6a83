"""Answer prompts in full, greedily, and score what comes out; many programs run as rows of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.generate import continue_prompts, ended, response_text
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.scoring import Reply, Score, repetition
from compile_steer.tokens import Text

# Decoding reads every weight once a step whatever the batch, so wide batches are nearly free.
_ROWS = 160


@dataclass(frozen=True)
class Request:
    """Prompts to be answered under a program; None is the base."""

    prompts: Sequence[str]
    program: Program | None = None


@dataclass(frozen=True)
class Answers:
    """Greedy answers to n prompts: the texts, their scores [n], repetition [n], and whether they ended [n]."""

    texts: list[str]
    scores: np.ndarray
    repetition: np.ndarray
    ended: np.ndarray


def answer(loaded: Loaded, requests: Sequence[Request], score: Score, max_new_tokens: int) -> list[Answers]:
    """Answer every request; the programs must share sites, operations and positions."""
    rows = [(prompt, request.program) for request in requests for prompt in request.prompts]
    pattern = next((program for _prompt, program in rows if program is not None), None)
    found = []
    for at in range(0, len(rows), _ROWS):
        part = rows[at : at + _ROWS]
        # A row a program; the base is the pattern at coefficient 0. No hooks where no row has a program.
        under = None if pattern is None else [pattern.scaled(0.0) if one is None else one for _prompt, one in part]
        prompts = [Text(prompt) for prompt, _program in part]
        found += continue_prompts(loaded, prompts, under, max_new_tokens=max_new_tokens)
    texts = [response_text(loaded, one) for one in found]
    closed = np.array([float(ended(loaded, one)) for one in found])
    replies = [
        Reply(prompt, text, bool(end)) for (prompt, _program), text, end in zip(rows, texts, closed, strict=True)
    ]
    scores = score(replies)
    repeats = np.array([repetition(text) for text in texts])
    result, start = [], 0
    for request in requests:
        mine = slice(start, start + len(request.prompts))
        result.append(Answers(texts[mine], scores[mine], repeats[mine], closed[mine]))
        start = mine.stop
    return result
