"""IFEval's verifiable constraints, by the checkers of the library `if-verifiable`."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compile_steer.common.errors import RecipeError, require_library
from compile_steer.data.behaviour import Behaviour, Check
from compile_steer.models.load import LoadedModel
from compile_steer.scoring.reply import Reply, Score, ScorerBase

_PROBE = "It is so. It was so."


class IFEval(ScorerBase):
    """1 if the reply satisfies the constraint `id`, or without one every constraint of its prompt in the data.

    The checkers of Zhou et al. (2311.07911); `loose` also accepts a reply that satisfies a constraint without its first
    line, its last line or its asterisks. Wrong where the letter of a constraint is not its sense: no comma is easy
    in a loop of one word, a required word may be denied or stand within another, and a language is guessed: of a few words wrongly, and
    where there are none any language passes. An empty reply is 0.
    """

    kind: Literal["ifeval"]
    id: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    loose: bool = False

    @model_validator(mode="after")
    def _arguments_of_something(self) -> Self:
        if self.arguments and self.id is None:
            raise ValueError("arguments belong to an id; without one the constraints are those of each prompt's data")
        return self

    @property
    def of_any_prompt(self) -> bool:
        return self.id is not None

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002  (a constraint is about text)
        require_library("if-verifiable", "ifeval", "validate.score ifeval")
        own = None if self.id is None else (Check(self.id, tuple(self.arguments.items())),)
        checks = behaviour.checks if own is None else {}
        if own is None:
            _require_checks(behaviour)
        _require_usable([check for some in checks.values() for check in some] if own is None else own)

        def score(replies: Sequence[Reply]) -> np.ndarray:
            return np.array(
                [_follows(reply, checks[reply.prompt] if own is None else own, self.loose) for reply in replies]
            )

        return score


def _require_checks(behaviour: Behaviour) -> None:
    asked = [pair.prompt for pair in (*behaviour.validation, *behaviour.test)]
    missing = [prompt for prompt in asked if not behaviour.checks.get(prompt)]
    if missing:
        raise RecipeError(
            f"validate.score ifeval: {len(missing)} of the {len(asked)} prompts of data.validation and data.test name no "
            f"constraint, the first '{missing[0]}'. Name one for all as validate.score.id, or give data with constraints."
        )


def _require_usable(checks: Iterable[Check]) -> None:
    """Try every constraint; raises one `RecipeError` with each that is unknown, incomplete, or lacks its data."""
    # It draws n-grams at random; with a seed the same text has the same language every time.
    importlib.import_module("langdetect").DetectorFactory.seed = 0
    different = {json.dumps([check.id, check.arguments], default=str): check for check in checks}
    problems = [problem for check in different.values() if (problem := _problem(check))]
    if problems:
        raise RecipeError([f"validate.score ifeval: {problem}" for problem in problems])


def _problem(check: Check) -> str:
    """Why a constraint cannot be checked; empty where it can be."""
    known, given = _checkers(), _given(check)
    if check.id not in known:
        return f"unknown constraint '{check.id}'; known are {', '.join(sorted(known))}."
    checker = known[check.id](check.id)
    wanted = f"its arguments are {', '.join(checker.get_instruction_args_keys()) or 'none'}"
    letters = [name for name in ("keywords", "forbidden_words") if isinstance(given.get(name), str)]
    if letters:
        return f"{check.id} needs a list of words as {letters[0]}; found '{given[letters[0]]}'."
    before = random.getstate()
    try:
        checker.build_description(**given)
        # What is not given, or out of its range, a checker draws: it would check something else every time.
        if random.getstate() != before:
            return f"{check.id} needs every argument, in its range: {wanted}; found {given}."
        checker.check_following(_PROBE)
    except (TypeError, ValueError, AttributeError, KeyError, re.error) as error:
        return f"{check.id} cannot be used with {given} ({error}); {wanted}."
    except LookupError:
        return (
            f"{check.id} splits text with NLTK's data 'punkt_tab', which is not installed. Where there is a network: "
            "python -m nltk.downloader punkt_tab; elsewhere copy that folder to ~/nltk_data/tokenizers. Or use another "
            "constraint."
        )
    finally:
        random.setstate(before)
    return ""


def _follows(reply: Reply, checks: Sequence[Check], loose: bool) -> float:
    """1 if the reply satisfies all of `checks`: IFEval's accuracy by prompt."""
    evaluate = importlib.import_module("if_verifiable.common").evaluate_instructions
    ids, arguments = [check.id for check in checks], [_given(check) for check in checks]
    _each, scores = evaluate(reply.text, ids, arguments, reply.prompt, _checkers())
    return float(scores.binary_loose if loose else scores.binary_strict)


def _given(check: Check) -> dict[str, Any]:
    """The arguments that are there: tables of constraints have every argument, with null where it is another's."""
    return {name: value for name, value in check.arguments if value is not None}


def _checkers() -> Mapping[str, Any]:
    found: Mapping[str, Any] = importlib.import_module("if_verifiable.ifeval").INSTRUCTION_DICT
    return found
