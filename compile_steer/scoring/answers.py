"""Answer prompts greedily under many programs, which run as rows of one batch, and score the answers.

A multiple-choice question is not answered in full: its answer is the letter that is most likely to begin the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from compile_steer.common import distributed
from compile_steer.data.behaviour import Question
from compile_steer.models.forward import lm_head, run_blocks
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import batches, encode
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.model_based import letter_tokens
from compile_steer.scoring.text import repetition
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program

# Decoding reads every weight once a step whatever the batch, so wide batches are nearly free.
_BATCH_ROWS = 160


@dataclass(frozen=True)
class Request:
    """Prompts to be answered under a program, or under one program per prompt; None is the base.

    `ask` makes the model's input from each prompt (with an instruction, say, or with examples before it); the score is
    about the plain prompt all the same. Samples to be shown need not be `scored`. `max_new_tokens` is for these answers alone.
    """

    prompts: Sequence[str]
    program: Program | Sequence[Program] | None = None
    ask: Callable[[str], Text] = Text
    scored: bool = True
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Answers:
    """Greedy answers to n prompts: texts, scores [n] (NaN if not scored), repetition [n], and whether each ended [n]."""

    texts: list[str]
    scores: np.ndarray
    repetition: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class _Row:
    index: int
    prompt: str
    text: Text
    program: Program | None
    question: Question | None
    limit: int


def answer(
    loaded: LoadedModel,
    requests: Sequence[Request],
    score: Score,
    max_new_tokens: int,
    questions: Mapping[str, Question] = MappingProxyType({}),
) -> list[Answers]:
    """Answer every request; programs of the same sites, operations and positions run in the same batches.

    Args:
        questions: the multiple-choice questions by plain prompt (see `Behaviour`).
    """
    rows: list[_Row] = []
    scored: list[int] = []
    for request in requests:
        n, under = len(request.prompts), request.program
        programs: Sequence[Program | None] = [under] * n if isinstance(under, Program | None) else under
        scored += range(len(rows), len(rows) + n) if request.scored else ()
        for prompt, program in zip(request.prompts, programs, strict=True):
            question = questions.get(prompt)
            text = request.ask(prompt if question is None else question.prompt)
            rows.append(_Row(len(rows), prompt, text, program, question, request.max_new_tokens or max_new_tokens))
    replies: dict[int, Reply] = {}
    # Rows of one batch may differ in their vectors and coefficients, but not in where the hooks are and what they do.
    groups: dict[object, list[_Row]] = {}
    for row in rows:
        if row.program is not None:
            groups.setdefault(row.program.shape, []).append(row)
    unsteered = [row for row in rows if row.program is None]
    for steered_rows in groups.values() or [[]]:
        # The base's rows join the first group, as a program of the same shape at coefficient 0.
        base = steered_rows[0].program.scaled(0.0) if steered_rows and steered_rows[0].program else None
        group, unsteered = steered_rows + unsteered, []
        replies |= _generate(loaded, [row for row in group if row.question is None], base)
        replies |= _choose(loaded, [row for row in group if row.question is not None], base)
    # All replies in one call, so that a judge is asked only once about a reply that occurs twice.
    scores = np.full(len(rows), np.nan)
    if scored:
        scores[scored] = score([replies[index] for index in scored])
    ends = np.cumsum([len(request.prompts) for request in requests])
    result = []
    for part in np.split(np.arange(len(rows)), ends[:-1]):
        answered = [replies[index] for index in part]
        repeats = np.array([repetition(reply.text) for reply in answered])
        finished = np.array([float(reply.ended) for reply in answered])
        result.append(Answers([reply.text for reply in answered], scores[part], repeats, finished))
    return result


def _programs(rows: Sequence[_Row], base: Program | None) -> list[Program] | None:
    """Return a program per row; None if no row has one, so that no hook runs."""
    return None if base is None else [base if row.program is None else row.program for row in rows]


def _generate(loaded: LoadedModel, rows: Sequence[_Row], base: Program | None) -> dict[int, Reply]:
    replies: dict[int, Reply] = {}
    for start in range(0, len(rows), _BATCH_ROWS):
        part = rows[start : start + _BATCH_ROWS]
        texts, longest = [row.text for row in part], max(row.limit for row in part)
        completions = continue_prompts(loaded, texts, _programs(part, base), max_new_tokens=longest)
        for row, whole in zip(part, completions, strict=True):
            completion = replace(whole, ids=whole.ids[: whole.n_prompt + row.limit])
            replies[row.index] = Reply(row.prompt, response_text(loaded, completion), ended(loaded, completion))
    return replies


def _choose(loaded: LoadedModel, rows: Sequence[_Row], base: Program | None) -> dict[int, Reply]:
    """Answer multiple-choice questions with their most likely letter."""
    letters = {row.question.letters for row in rows if row.question is not None}
    tokens = {some: letter_tokens(loaded.tokenizer, some) for some in letters}
    rows = distributed.share(rows)
    encoded = [encode(loaded.tokenizer, row.text) for row in rows]
    replies: dict[int, Reply] = {}
    for batch in batches(loaded, encoded):
        part = [rows[index] for index in batch.rows]
        with steered(loaded.model, _programs(part, base), roles=batch.roles), torch.no_grad():
            hidden = run_blocks(loaded.model, batch.input_ids, batch.attention_mask)
            last = batch.attention_mask.sum(dim=1) - 1  # batches are padded on the right
            # Only there: logits of every token would be gigabytes.
            logits = lm_head(loaded.model, hidden[torch.arange(len(part), device=hidden.device), last])
        for row, values in zip(part, logits, strict=True):
            assert row.question is not None
            best = int(values[tokens[row.question.letters]].argmax())
            replies[row.index] = Reply(row.prompt, row.question.letters[best], True)
    return {index: reply for part in distributed.gather(replies) for index, reply in part.items()}
