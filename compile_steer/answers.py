"""Answer prompts in full, greedily, and score what comes out; many programs run as rows of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.generate import continue_prompts, ended, response_text
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.scoring import Reply, Score, repetition
from compile_steer.tokens import Encoded, Text

# Decoding reads every weight once a step whatever the batch, so wide batches are nearly free.
_ROWS = 160


@dataclass(frozen=True)
class Request:
    """Plain prompts to be answered under a program, or one program a prompt; None is the base.

    `said` is what the model is given in their place (an instruction with the prompt, turns before it); the
    scorer is told the plain prompt.
    """

    prompts: Sequence[str]
    program: Program | Sequence[Program] | None = None
    said: Sequence[Text] | None = None


@dataclass(frozen=True)
class Answers:
    """Greedy answers to n prompts: the texts, their scores [n], repetition [n], and whether they ended [n]."""

    texts: list[str]
    scores: np.ndarray
    repetition: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class _Row:
    prompt: str
    said: Text
    program: Program | None


def answer(loaded: Loaded, requests: Sequence[Request], score: Score, max_new_tokens: int) -> list[Answers]:
    """Answer every request; `add` programs must share sites and positions. Other programs run one after the other."""
    rows = [row for request in requests for row in _rows(request)]
    found: dict[int, Encoded] = {}
    for part in _parts(rows):
        programs = [rows[at].program for at in part]
        given = [program for program in programs if program is not None]
        under: Program | list[Program] | None = None
        if given and all(program is given[0] for program in programs):
            under = given[0]
        elif given:  # A row a program; the base is a program at coefficient 0. No hooks where no row has one.
            under = [given[0].scaled(0.0) if program is None else program for program in programs]
        said = [rows[at].said for at in part]
        found |= zip(part, continue_prompts(loaded, said, under, max_new_tokens=max_new_tokens), strict=True)
    encoded = [found[at] for at in range(len(rows))]
    texts = [response_text(loaded, one) for one in encoded]
    closed = np.array([float(ended(loaded, one)) for one in encoded])
    scores = score([Reply(row.prompt, text, bool(end)) for row, text, end in zip(rows, texts, closed, strict=True)])
    repeats = np.array([repetition(text) for text in texts])
    result, start = [], 0
    for request in requests:
        mine = slice(start, start + len(request.prompts))
        result.append(Answers(texts[mine], scores[mine], repeats[mine], closed[mine]))
        start = mine.stop
    return result


def _rows(request: Request) -> Iterator[_Row]:
    said = request.said if request.said is not None else [Text(prompt) for prompt in request.prompts]
    programs: Sequence[Program | None]
    if request.program is None or isinstance(request.program, Program):
        programs = [request.program] * len(request.prompts)
    else:
        programs = request.program
    for prompt, text, program in zip(request.prompts, said, programs, strict=True):
        yield _Row(prompt, text, program)


def _parts(rows: Sequence[_Row]) -> Iterator[list[int]]:
    """Indices of rows that can run together: all of them, or where an operation is no `add`, those of one program."""
    together = all(i.operation == "add" for row in rows if row.program is not None for i in row.program.interventions)
    groups: dict[int, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(0 if together else id(row.program), []).append(at)
    for group in groups.values():
        for start in range(0, len(group), _ROWS):
            yield group[start : start + _ROWS]
