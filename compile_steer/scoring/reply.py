"""What a scorer is given, and what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compile_steer.common.options import Section
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel


@dataclass(frozen=True)
class Reply:
    """What a model said to a plain prompt, and whether it ended its turn by itself."""

    prompt: str
    text: str
    ended: bool


Score = Callable[[Sequence[Reply]], np.ndarray]
"""[n] replies -> [n] in 0 to 1: how much of the behaviour each shows."""


class ScorerBase(Section, ABC):
    """A section of the recipe that says how replies are scored."""

    @abstractmethod
    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        """The score itself, with what it needs of model and data; raises `RecipeError` for what cannot be scored.

        Args:
            loaded: the base, whatever the replies come from.
        """

    @property
    def of_any_prompt(self) -> bool:
        """True if a reply to a prompt that is not in the data can be scored too, here and at no cost."""
        return True

    def on_texts(self) -> ScorerBase | str:
        """The scorer as far as it can score the texts of the data, or why it cannot: see `require_discrimination`."""
        return self


class TextScorer(ScorerBase):
    """A scorer of the text alone."""

    @abstractmethod
    def score(self, text: str) -> float: ...

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002  (the text says it all)
        return lambda replies: np.array([self.score(reply.text) for reply in replies])
