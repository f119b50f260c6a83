"""Answer prompts in full, many programs in one batch, and score what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from compile_steer.generate import continue_prompts, ended, response_text
from compile_steer.hooks import steered
from compile_steer.models import Loaded
from compile_steer.program import Program
from compile_steer.scoring import Scorer, repetition

_ROWS = 64


@dataclass(frozen=True)
class Answers:
    """Greedy answers to n prompts: the texts, their scores [n], repetition [n], and whether they ended [n]."""

    texts: list[str]
    scores: np.ndarray
    repetition: np.ndarray
    ended: np.ndarray


def answer(
    loaded: Loaded, prompts: Sequence[str], programs: Sequence[Program | None], scorer: Scorer, max_new_tokens: int
) -> list[Answers]:
    """Answer all prompts under each program (None is the base), several programs as rows of one batch."""
    together = max(1, _ROWS // len(prompts))
    groups = [[program] for program in programs if program is None]
    active = [program for program in programs if program is not None]
    groups += [list(active[i : i + together]) for i in range(0, len(active), together)]
    done: dict[int, Answers] = {}
    for group in groups:
        rows = [program for program in group if program is not None for _ in prompts]
        with steered(loaded.model, rows) if rows else nullcontext():
            found = continue_prompts(loaded, [*prompts] * len(group), max_new_tokens=max_new_tokens)
        for n, program in enumerate(group):
            mine = found[n * len(prompts) : (n + 1) * len(prompts)]
            texts = [response_text(loaded, one) for one in mine]
            done[id(program)] = Answers(
                texts,
                np.array([scorer.score(text) for text in texts]),
                np.array([repetition(text) for text in texts]),
                np.array([float(ended(loaded, one)) for one in mine]),
            )
    return [done[id(program)] for program in programs]
