"""Write a recipe for a behaviour of one's own: from a file of pairs, or from pairs that the model writes itself."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.writing import new_folder
from compile_steer.common.errors import RecipeError, brief, shell_word
from compile_steer.common.progress import Progress
from compile_steer.common.reading import read_json_lines
from compile_steer.common.yaml import parse_yaml
from compile_steer.data.behaviour import SIDES, SPLITS, normalized
from compile_steer.data.pairs import checked_pairs
from compile_steer.data.section import TEXTS, GenerateOptions
from compile_steer.data.shapes import PAIR, QUESTION
from compile_steer.data.sources import Reader, Row
from compile_steer.extraction.generate_pairs import Completion, completion_problem, generate_side, kept_rows
from compile_steer.models.text import Pair, Text
from compile_steer.recipe import Recipe
from compile_steer.scoring.base import Score, ScorerBase
from compile_steer.scoring.model_based import Choice
from compile_steer.scoring.propose import Proposal, propose_score
from compile_steer.scoring.text import TextScorer
from compile_steer.validation.power import score_power

Rows = Mapping[str, Sequence[Row]]
SCHEMA = ".compile-steer.schema.json"
# Of train, validation and test: twenty pairs are enough for a direction, it is the claim that takes many.
_FRACTIONS = (0.4, 0.2, 0.4)
_LEAST = (8, 4, 8)  # with fewer nothing can be shown
_PROMPTS = (56, 32, 56)  # of the package's, that the model answers for each split
_WRITING = GenerateOptions(max_new_tokens=40)
_USES = ("to find the direction", "to choose block and strength", "measured once")
_REQUEST = "Answer as somebody who"
_EFFECT = 0.2  # of the mean score: what a test should be able to show


@dataclass(frozen=True)
class NewRecipe:
    """What was written: the recipe, its rows in each split, why the score is what it is, what the test can show."""

    path: Path
    rows: dict[str, int]
    score: str
    power: str
    next: str


def new_recipe(
    name: str, behaviour: str, source: Path | None, model: str, out: Path, progress: Progress, overwrite: bool = False
) -> NewRecipe:
    """Write `out`/NAME.yaml and `out`/data/NAME/; raises `RecipeError`, with nothing written, where that cannot work.

    Args:
        behaviour: what the model is to do, as the end of a sentence: "speaks like a pirate".
        source: a file of pairs; without it the model writes them, asked for the behaviour and not.
    """
    path, data = out / f"{name}.yaml", out / "data" / name
    schema, problems = recipe_schema(), list[str]()
    if not re.fullmatch(schema["properties"]["name"]["pattern"], name):
        problems.append(f"the name {brief(name)} cannot be used; needed: letters, digits, _ . and -, at most 100.")
    elif not overwrite:
        problems += [
            f"{old} is there already. Take another name, or --overwrite." for old in (path, data) if old.exists()
        ]
    if source is None and not behaviour.strip():
        problems.append('needed: --behaviour "speaks like a pirate", --from PAIRS.jsonl, or both.')
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]{0,300}", behaviour):
        problems.append("--behaviour must be one line of at most 300 characters.")
    if problems:
        raise RecipeError(problems)
    instruction = f"{_REQUEST} {behaviour.strip(' .')}." if behaviour.strip() else ""
    if source is None:
        rows, proposal = _written_pairs(instruction, model, progress)
        origin = "The model wrote the pairs: asked for the behaviour (positive) and not (negative)."
    else:
        rows, proposal = _read_pairs(source)
        origin = f"The pairs of {brief(source.name)}; no prompt or response is in two files."
    if isinstance(proposal.scorer, TextScorer):
        scores = {side: [proposal.scorer.score(row[side]) for row in rows["validation"]] for side in SIDES}
        held_out = f"; of validation {np.mean(scores['positive']):.0%} and {np.mean(scores['negative']):.0%}"
        proposal = replace(proposal, reason=f"{proposal.reason} training responses{held_out}")
    text = _recipe_text(name, model, behaviour, instruction, origin, rows, proposal)
    recipe = Recipe.recall(
        parse_yaml(text).content, out, path.name
    )  # what it refuses is refused before anything is written
    with new_folder(data) as folder:
        for split, part in rows.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    save_text(out / SCHEMA, json.dumps(schema, indent=1) + "\n")
    save_text(path, text)  # last: where a recipe is, its data are
    counts = {split: len(part) for split, part in rows.items()}
    answered = min(counts["test"], recipe.validate_.prompts)
    power = score_power(0.5 if isinstance(proposal.scorer, Choice) else 0.0, _EFFECT, answered)
    return NewRecipe(path, counts, proposal.reason, str(power), f"compile-steer run {shell_word(path)}")


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, by which editors complete and check one."""
    schema = Recipe.model_json_schema()
    del schema["properties"]["folder"]  # where the file lies, which none says
    schema["required"].remove("folder")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "compile-steer recipe"}


# ----------------------------------------------------------------------------------- pairs from a file


def _read_pairs(source: Path) -> tuple[Rows, Proposal]:
    """Return the rows of a file by split, and a score for them; as multiple choice where they are letters, or few words."""
    reader, questions = Reader(Path(), section=""), Reader(Path(), section="")
    rows = reader.rows("--from", source, PAIR)
    answers = {normalized(row[side]) for row in rows for side in SIDES}
    if len(answers) <= len(rows) / 2:
        choices = questions.rows("--from", source, QUESTION)
        if choices and not questions.problems:
            proposal = Proposal(Choice(kind="choice"), "the likeliest letter is the right one")
            return _divided(source, choices, lambda row: [row["question"]]), proposal
    checked_pairs([(row.place, row) for row in rows], reader.problems)
    parts = _divided(source, rows, lambda row: [row[key] for key in PAIR])
    return parts, _proposal(parts["train"])


def _divided(source: Path, rows: Sequence[Row], texts: Callable[[Row], list[str]]) -> Rows:
    """Divide rows into the splits; those that share one of their `texts` stay together. The same rows, the same splits."""
    group = list(range(len(rows)))  # by row: an earlier one that it belongs to, or itself
    first: dict[str, int] = {}

    def root(n: int) -> int:
        while group[n] != n:
            n = group[n]
        return n

    for n, row in enumerate(rows):
        for text in texts(row):
            group[root(n)] = root(first.setdefault(normalized(text), n))
    groups: dict[int, list[int]] = {}
    for n in range(len(rows)):
        groups.setdefault(root(n), []).append(n)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    order.sort(key=len, reverse=True)  # stable: of equal size in the order drawn
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    wanted = dict(zip(SPLITS, (fraction * len(rows) for fraction in _FRACTIONS), strict=True))
    for members in order:
        parts[max(SPLITS, key=lambda split: wanted[split] - len(parts[split]))] += members
    if any(len(parts[split]) < least for split, least in zip(SPLITS, _LEAST, strict=True)):
        sizes = ", ".join(f"{len(parts[split])} for {split}" for split in SPLITS)
        together = (
            f"; {len(order[0])} of them share texts, which must not be in two splits" if len(order[0]) > 1 else ""
        )
        raise RecipeError(
            f"{source.name}: {len(rows)} rows give {sizes}{together}. Needed: {_LEAST[0]}, {_LEAST[1]} and {_LEAST[2]} at "
            f"least, so {sum(_LEAST)} rows; {_rows_for(_EFFECT)} show a change of the score by {_EFFECT}."
        )
    return {split: [rows[n] for n in sorted(part)] for split, part in parts.items()}


def _rows_for(effect: float) -> int:
    """How many rows a file must have for a test split that shows a change of the score from 0 by `effect`."""
    return math.ceil(score_power(0.0, effect, 1).needed / _FRACTIONS[2])


def _proposal(rows: Sequence[Row]) -> Proposal:
    neutral = [row["response"] for _line, row in read_json_lines(TEXTS / "neutral.jsonl")]
    return propose_score([row["positive"] for row in rows], [row["negative"] for row in rows], neutral, _REQUEST)


# ----------------------------------------------------------------------------------- pairs that the model writes


def _written_pairs(instruction: str, model: str, progress: Progress) -> tuple[Rows, Proposal]:
    """Let the model answer the package's prompts, asked for the behaviour and not; raises `RecipeError` after the first
    split if it does not show it.
    """
    from compile_steer.models.load import load  # not with the module: it imports torch

    loaded = load(model)
    prompts = (row["prompt"] for _line, row in read_json_lines(TEXTS / "prompts.jsonl"))
    rows: dict[str, list[Row]] = {}
    earlier: set[str] = set()
    proposal: Proposal | None = None
    with progress.phase("the model writes both sides of the pairs", 2 * sum(_PROMPTS)) as advance:
        for split, n, least in zip(SPLITS, _PROMPTS, _LEAST, strict=True):
            pairs = [Pair(Text(f"{prompt} {instruction}"), Text(prompt), prompt) for prompt in islice(prompts, n)]
            positive, _n = generate_side(loaded, "positive", pairs, _any_reply(1.0), _WRITING, 0, advance)
            negative, _n = generate_side(loaded, "negative", pairs, _any_reply(0.0), _WRITING, 0, advance)
            problems: list[str] = []
            if proposal is None:
                usable, _report = kept_rows(pairs, positive, negative, 2 * n, set())
                try:
                    proposal = _proposal(usable)
                except RecipeError as error:
                    problems = list(error.problems)
            scorer = None if proposal is None else proposal.scorer
            judged = (_judged("positive", positive, scorer), _judged("negative", negative, scorer))
            rows[split], report = kept_rows(pairs, *judged, 2 * n, earlier)
            if problems or len(rows[split]) < least:
                examples = [f"{reason}: {text}" for reason, text in report.examples.items()]
                raise RecipeError(
                    [
                        f"the model cannot write pairs for {brief(instruction)}: of the {split} prompts, "
                        f"{report.describe()}; needed: {least}.",
                        *problems,
                        *examples,
                        "Next: say it in other words (--behaviour), take a larger model (--model), or give pairs of your "
                        f"own (--from PAIRS.jsonl, {sum(_LEAST)} at least, {_rows_for(_EFFECT)} to show a change of the score "
                        f"by {_EFFECT}). Small models write personas and styles, and hardly any form.",
                    ]
                )
    assert proposal is not None
    return rows, proposal


def _any_reply(value: float) -> Score:
    """The same score for every reply, what is wanted of its side: what the behaviour looks like is not known yet."""
    return lambda replies: np.full(len(replies), value)


def _judged(side: str, completions: Sequence[Completion], scorer: ScorerBase | None) -> list[Completion]:
    """Return the completions, with the problem that `scorer` finds where they had none."""
    if not isinstance(scorer, TextScorer):
        return list(completions)
    return [
        Completion(text, problem or completion_problem(side, text, scorer.score(text), _WRITING))
        for text, problem in completions
    ]


# ----------------------------------------------------------------------------------- the recipe's text


def _recipe_text(
    name: str, model: str, behaviour: str, instruction: str, origin: str, rows: Rows, proposal: Proposal
) -> str:
    def quoted(value: str) -> str:
        return "'" + value.replace("'", "''") + "'"

    uses = {split: f"  # {len(rows[split])}: {use}" for split, use in zip(SPLITS, _USES, strict=True)}
    score = proposal.scorer.model_dump(mode="json", exclude_defaults=True)
    choices = score["kind"] == "choice"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA}",
        f"# {name}: {behaviour.strip() or 'the behaviour of the positive side of its pairs'}",
        "#",
        "# A key that is left out has its default. --set key.of.it=value tries another value without a change here.",
        f"name: {name}",
        f"model: {quoted(model)}",
        "budget: quick  # a verdict in minutes; standard and thorough measure more",
        "",
        f"# {origin}",
        "data:",
        *(["  kind: choices", "  balance_letters: true  # each letter is right equally often"] if choices else []),
        *(f"  {split}: data/{name}/{split}.jsonl{uses[split]}" for split in SPLITS),
        "",
        *(["extract: {method: pasf}  # right minus wrong letters", ""] if choices else []),
        "validate:",
        "  # When an answer shows the behaviour. Everything is measured by it: read it, and change it where it is wrong.",
        f"  # {proposal.reason}.",
        "  score:",
        *(
            f"    {key}: {'[' + ', '.join(map(quoted, value)) + ']' if isinstance(value, list) else value}"
            for key, value in score.items()
        ),
        *(["  positions: last_prompt  # where the letter is decided"] if choices else []),
        *(["  # steering is compared with asking for it in the prompt"] if instruction else []),
        *([f"  instruction: {quoted(instruction)}"] if instruction else []),
    ]
    return "\n".join(lines) + "\n"
