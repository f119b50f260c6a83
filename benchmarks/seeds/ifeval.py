"""IFEval prompts with the instruction split off (as in microsoft/llm-steer-instruct): rows, answers, accuracy.

The files are not part of this repository: COMPILE_STEER_IFEVAL names the folder that holds them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour, Check
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.scoring.base import Reply
from compile_steer.scoring.text import IFEval
from compile_steer.steering.program import Program
from compile_steer.steering.sites import Site

FOLDER = "COMPILE_STEER_IFEVAL"
FORMAT, INCLUDE, EXCLUDE = (
    f"ifeval_single_{name}.jsonl" for name in ("instr_format", "keyword_include", "keyword_exclude")
)


@dataclass(frozen=True)
class Row:
    """A prompt with its instruction and without, and what an answer must satisfy."""

    asked: str
    plain: str
    check: Check

    @property
    def word(self) -> str:
        """The word of a keyword row."""
        ((_name, words),) = self.check.arguments
        return str(words[0])


def read(name: str) -> list[Row]:
    """The rows of one file, in its order; raises `RecipeError` where there is none."""
    folder = os.environ.get(FOLDER)
    if not folder:
        raise RecipeError(
            f"seed B needs IFEval's prompts with the instruction split off: set {FOLDER} to a folder with {FORMAT}, {INCLUDE} "
            f"and {EXCLUDE} (data of microsoft/llm-steer-instruct)."
        )
    path = Path(folder) / name
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"{FOLDER}: {path} cannot be read ({error.strerror}).") from error
    found = []
    for line in filter(str.strip, lines):
        row = json.loads(line)
        arguments = tuple(sorted(row["kwargs"][0].items()))
        found.append(
            Row(row["prompt"], row["prompt_without_instruction"], Check(row["instruction_id_list"][0], arguments))
        )
    return found


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every instruction, in the order of the file."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.check.id].append(row)
    return dict(kinds)


@dataclass(frozen=True)
class Answers:
    """Greedy answers of `max_new_tokens`."""

    model: LoadedModel
    max_new_tokens: int

    def __call__(self, prompts: Sequence[str], programs: Sequence[Program] | None = None) -> list[Reply]:
        """One reply for each prompt, under its program; those whose programs share their sites are written as one batch."""
        batches: dict[tuple[Site, ...], list[int]] = defaultdict(list)
        for n in range(len(prompts)):
            batches[() if programs is None else tuple(i.site for i in programs[n].interventions)].append(n)
        replies: dict[int, Reply] = {}
        for rows in batches.values():
            texts = [Text(prompts[n]) for n in rows]
            own = None if programs is None else [programs[n] for n in rows]
            for n, one in zip(
                rows, continue_prompts(self.model, texts, own, max_new_tokens=self.max_new_tokens), strict=True
            ):
                replies[n] = Reply(prompts[n], response_text(self.model, one), ended(self.model, one))
        return [replies[n] for n in range(len(prompts))]


def follows(loaded: LoadedModel, rows: Sequence[Row], replies: Sequence[Reply]) -> np.ndarray:
    """[n] whether each reply satisfies its row's constraint, loosely as the authors count."""
    pairs = tuple(Pair(Text(row.asked), Text(row.plain), row.asked) for row in rows)
    data = Behaviour((), (), pairs, (), (), (), {}, checks={row.asked: (row.check,) for row in rows})
    score = IFEval(kind="ifeval", loose=True).bind(loaded, data)
    return score([Reply(row.asked, one.text, one.ended) for row, one in zip(rows, replies, strict=True)])
