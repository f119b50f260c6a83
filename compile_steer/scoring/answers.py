"""Answer prompts greedily and score what comes out; many programs run as rows of one batch.

A prompt is answered in full, but a multiple-choice question is not: its answer is the letter that is likeliest to
begin the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from compile_steer.data.behaviour import Question
from compile_steer.models.forward import lm_head, run_blocks
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import batches, encode
from compile_steer.scoring.choice import letter_tokens
from compile_steer.scoring.reply import Reply, Score
from compile_steer.scoring.text import repetition
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program

# Decoding reads every weight once a step whatever the batch, so wide batches are nearly free.
_ROWS = 160


@dataclass(frozen=True)
class Request:
    """Prompts to be answered under a program, or one program a prompt; None is the base.

    `ask` makes what the model is given of each (with an instruction, say, or with examples before it); the score is
    about the plain prompts all the same. Samples to look at need not be `scored`.
    """

    prompts: Sequence[str]
    program: Program | Sequence[Program] | None = None
    ask: Callable[[str], Text] = Text
    scored: bool = True


@dataclass(frozen=True)
class Answers:
    """Greedy answers to n prompts: the texts, their scores [n] (NaN where not scored), repetition [n], and whether
    they ended [n]."""

    texts: list[str]
    scores: np.ndarray
    repetition: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class _Row:
    prompt: str
    said: Text
    program: Program | None
    question: Question | None
    scored: bool


def answer(
    loaded: LoadedModel,
    requests: Sequence[Request],
    score: Score,
    max_new_tokens: int,
    questions: Mapping[str, Question] = MappingProxyType({}),
) -> list[Answers]:
    """Answer every request; programs of the same sites, operations and positions run in the same batches.

    Args:
        questions: by plain prompt, those that are multiple choice (see `Behaviour`).
    """
    rows = [row for request in requests for row in _rows(request, questions)]
    replies: dict[int, Reply] = {}
    for group in _groups(rows):
        replies |= _generate(loaded, group, max_new_tokens) | _choose(loaded, group)
    scores = np.full(len(rows), np.nan)
    wanted = [index for index, row in enumerate(rows) if row.scored]
    scores[wanted] = score([replies[index] for index in wanted])
    result, start = [], 0
    for request in requests:
        mine = range(start, start + len(request.prompts))
        texts = [replies[index].text for index in mine]
        repeats = np.array([repetition(text) for text in texts])
        closed = np.array([float(replies[index].ended) for index in mine])
        result.append(Answers(texts, scores[mine.start : mine.stop], repeats, closed))
        start = mine.stop
    return result


def _rows(request: Request, questions: Mapping[str, Question]) -> Iterator[_Row]:
    count = len(request.prompts)
    programs: Sequence[Program | None]
    programs = [request.program] * count if isinstance(request.program, Program | None) else request.program
    for prompt, program in zip(request.prompts, programs, strict=True):
        question = questions.get(prompt)
        said = request.ask(prompt if question is None else question.prompt)
        yield _Row(prompt, said, program, question, request.scored)


@dataclass(frozen=True)
class _Group:
    """Rows by index that one batch can hold: a program a row, where the base is `pattern` at coefficient 0."""

    rows: list[tuple[int, _Row]]
    pattern: Program | None

    def under(self, rows: Sequence[_Row]) -> list[Program] | None:
        """No hooks where no row has a program."""
        if self.pattern is None:
            return None
        base = self.pattern.scaled(0.0)
        return [base if row.program is None else row.program for row in rows]


def _groups(rows: Sequence[_Row]) -> list[_Group]:
    """The rows by the shape of their programs; those of the base go with the first."""
    groups: dict[object, _Group] = {}
    base: list[tuple[int, _Row]] = []
    for index, row in enumerate(rows):
        if row.program is None:
            base.append((index, row))
        else:
            groups.setdefault(row.program.shape, _Group([], row.program)).rows.append((index, row))
    found = list(groups.values()) or [_Group([], None)]
    found[0].rows.extend(base)
    return found


def _generate(loaded: LoadedModel, group: _Group, max_new_tokens: int) -> dict[int, Reply]:
    """The rows that are no questions, by their index, answered in full."""
    open_ended = [(index, row) for index, row in group.rows if row.question is None]
    found: dict[int, Reply] = {}
    for at in range(0, len(open_ended), _ROWS):
        part = open_ended[at : at + _ROWS]
        under = group.under([row for _index, row in part])
        said = continue_prompts(loaded, [row.said for _index, row in part], under, max_new_tokens=max_new_tokens)
        for (index, row), one in zip(part, said, strict=True):
            found[index] = Reply(row.prompt, response_text(loaded, one), ended(loaded, one))
    return found


def _choose(loaded: LoadedModel, group: _Group) -> dict[int, Reply]:
    """The questions among the rows, by their index: each answered with its likeliest letter."""
    asked = [(index, row, row.question) for index, row in group.rows if row.question is not None]
    tokens = {q.letters: letter_tokens(loaded.tokenizer, q.letters) for _index, _row, q in asked}
    encoded = [encode(loaded.tokenizer, row.said) for _index, row, _question in asked]
    found: dict[int, Reply] = {}
    for batch in batches(loaded, encoded):
        chosen = [asked[at] for at in batch.rows]
        under = group.under([row for _index, row, _question in chosen])
        with steered(loaded.model, under, roles=batch.roles), torch.no_grad():
            hidden = run_blocks(loaded.model, batch.input_ids, batch.attention_mask)
            last = batch.attention_mask.sum(dim=1) - 1
            logits = lm_head(loaded.model, hidden[torch.arange(len(chosen), device=hidden.device), last])
        for (index, row, question), scores in zip(chosen, logits, strict=True):
            best = int(scores[tokens[question.letters]].argmax())
            found[index] = Reply(row.prompt, question.letters[best], True)
    return found
