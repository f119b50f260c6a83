"""IFEval prompts with the instruction split off (as in microsoft/llm-steer-instruct): rows, answers, accuracy.

The files are not part of this repository: COMPILE_STEER_IFEVAL names the folder that holds them.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compile_steer.artifacts.files import digest, save_json
from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour, Check
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel, cache_folder
from compile_steer.models.text import Pair, Text
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.text import IFEval
from compile_steer.steering.program import Program

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


@dataclass
class Answers:
    """Greedy answers of `max_new_tokens`, kept on disk by what they depend on: a run that was stopped goes on."""

    loaded: LoadedModel
    max_new_tokens: int
    path: Path = field(default_factory=lambda: cache_folder() / "seed-b-answers.json")
    kept: dict[str, list[tuple[str, bool]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kept and self.path.is_file():
            self.kept = json.loads(self.path.read_text("utf-8"))

    def __call__(
        self, prompts: Sequence[str], programs: Sequence[Program] | None = None, patched: str = ""
    ) -> list[Reply]:
        """One reply a prompt; those whose programs share their sites are written as one batch.

        Args:
            programs: one a prompt, or none at all.
            patched: names the edit of the weights that is on, if one is.
        """
        sites = [
            () if programs is None else tuple(i.site for i in programs[n].interventions) for n in range(len(prompts))
        ]
        found: dict[int, Reply] = {}
        for site in dict.fromkeys(sites):
            rows = [n for n in range(len(prompts)) if sites[n] == site]
            under = None if programs is None else [programs[n] for n in rows]
            replies = self._batch([prompts[n] for n in rows], under, patched)
            found |= dict(zip(rows, replies, strict=True))
        return [found[n] for n in range(len(prompts))]

    def _batch(self, prompts: Sequence[str], programs: Sequence[Program] | None, patched: str) -> list[Reply]:
        how = [_values(program) for program in programs or []]
        key = digest([list(prompts), how, self.max_new_tokens, self.loaded.id, self.loaded.revision, patched])
        if key not in self.kept:
            texts = [Text(prompt) for prompt in prompts]
            said = continue_prompts(self.loaded, texts, programs, max_new_tokens=self.max_new_tokens)
            self.kept[key] = [(response_text(self.loaded, one), ended(self.loaded, one)) for one in said]
            save_json(self.path, self.kept)
        return [Reply(prompt, text, end) for prompt, (text, end) in zip(prompts, self.kept[key], strict=True)]


def _values(program: Program) -> list[object]:
    return [[i.describe(), i.projection, [round(x, 4) for x in i.vector.tolist()]] for i in program.interventions]


def follows(loaded: LoadedModel, rows: Sequence[Row], replies: Sequence[Reply]) -> np.ndarray:
    """[n] whether each reply satisfies its row's constraint, loosely as the authors count."""
    return _score(loaded, rows)([Reply(row.asked, one.text, one.ended) for row, one in zip(rows, replies, strict=True)])


def _score(loaded: LoadedModel, rows: Sequence[Row]) -> Score:
    pairs = tuple(Pair(Text(row.asked), Text(row.plain), row.asked) for row in rows)
    behaviour = Behaviour((), (), pairs, (), (), (), {}, checks={row.asked: (row.check,) for row in rows})
    return IFEval(kind="ifeval", loose=True).bind(loaded, behaviour)
