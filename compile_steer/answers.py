"""Answer prompts in full, greedily, and score what comes out; many programs run as rows of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from compile_steer.generate import continue_prompts, ended, response_text
from compile_steer.hooks import steered
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.scoring import Scorer, repetition

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


def _rows(loaded: Loaded, pattern: Program | None, programs: Sequence[Program | None]) -> AbstractContextManager[None]:
    """Hooks with a program a row; the base is `pattern` at coefficient 0. No hooks where no row has a program."""
    if pattern is None:
        return nullcontext()
    return steered(loaded.model, [pattern.scaled(0.0) if program is None else program for program in programs])


def answer(loaded: Loaded, requests: Sequence[Request], scorer: Scorer, max_new_tokens: int) -> list[Answers]:
    """Answer every request; the programs must share sites, operations and positions."""
    rows = [(prompt, request.program) for request in requests for prompt in request.prompts]
    pattern = next((program for _prompt, program in rows if program is not None), None)
    found = []
    for at in range(0, len(rows), _ROWS):
        part = rows[at : at + _ROWS]
        with _rows(loaded, pattern, [program for _prompt, program in part]):
            found += continue_prompts(loaded, [prompt for prompt, _p in part], max_new_tokens=max_new_tokens)
    texts = [response_text(loaded, one) for one in found]
    scores = np.array([scorer.score(text) for text in texts])
    repeats = np.array([repetition(text) for text in texts])
    closed = np.array([float(ended(loaded, one)) for one in found])
    result, start = [], 0
    for request in requests:
        mine = slice(start, start + len(request.prompts))
        result.append(Answers(texts[mine], scores[mine], repeats[mine], closed[mine]))
        start = mine.stop
    return result
