"""Small behaviours and replies for the tests of scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from compile_steer.data.behaviour import Behaviour, Check, Question
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.scoring.base import Reply, ScorerBase, require_discrimination
from compile_steer.scoring.options import Scorer

Sides = Sequence[tuple[str, str]]


def pairs(name: str, sides: Sides) -> tuple[Pair, ...]:
    """A pair for each (positive, negative) response, under the prompts 'NAME 0', 'NAME 1' ..."""
    return tuple(
        Pair(Text(f"{name} {n}", positive), Text(f"{name} {n}", negative), f"{name} {n}")
        for n, (positive, negative) in enumerate(sides)
    )


def behaviour(
    validation: Sides,
    train: Sides = (),
    test: Sides = (),
    questions: Mapping[str, Question] | None = None,
    checks: Mapping[str, tuple[Check, ...]] | None = None,
) -> Behaviour:
    splits = [pairs(name, sides) for name, sides in (("train", train), ("validation", validation), ("test", test))]
    return Behaviour(splits[0], splits[1], splits[2], (), (), (), {}, questions or {}, checks or {})


def make_replies(*texts: str, prompt: str = "validation 0", ended: bool = True) -> list[Reply]:
    return [Reply(prompt, text, ended) for text in texts]


def make_scorer(**settings: Any) -> ScorerBase:
    """A scorer as a recipe's section names it."""
    adapter: TypeAdapter[ScorerBase] = TypeAdapter(Scorer)
    return adapter.validate_python(settings)


def discrimination(scorer: ScorerBase, model: LoadedModel, data: Behaviour) -> str:
    """The check before a sweep: why it was skipped, empty if it passed."""
    return require_discrimination(scorer, scorer.bind(model, data), model, data)
