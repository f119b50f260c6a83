"""The recipe's `validate.score`: one scorer, or several of which a reply must satisfy all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from compile_steer.scoring.base import Reply, Score, ScorerBase
from compile_steer.scoring.classifier import Classifier
from compile_steer.scoring.judge import Judge
from compile_steer.scoring.model_based import Choice, Ended, Perplexity
from compile_steer.scoring.text import IFEval, Keywords, Length, Lowercase, Repetition

if TYPE_CHECKING:
    from compile_steer.data.behaviour import Behaviour
    from compile_steer.models.load import LoadedModel

Single = Keywords | Lowercase | Length | Repetition | Perplexity | Ended | IFEval | Choice | Classifier | Judge


class All(ScorerBase):
    """The minimum of the parts' scores: a reply must satisfy all of `all_of`.

    Wrong if one part hardly ever fires: it hides what the others would have shown. A judge among the parts scores only
    replies to which the others give more than 0.
    """

    kind: Literal["all"]
    all_of: tuple[Annotated[Single, Field(discriminator="kind")], ...] = Field(min_length=2, description="scorers")

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        # Judges last (the sort is stable), because each of their answers costs a request.
        parts = [part.bind(loaded, behaviour) for part in sorted(self.all_of, key=lambda part: part.kind == "judge")]

        def score(replies: Sequence[Reply]) -> np.ndarray:
            least = np.ones(len(replies))
            for part in parts:
                left = np.flatnonzero(least > 0)  # a 0 cannot get lower, and a part may cost a request
                if len(left):
                    least[left] = np.minimum(least[left], part([replies[int(index)] for index in left]))
            return least

        return score

    @property
    def needs_no_labels(self) -> bool:
        return all(part.needs_no_labels for part in self.all_of)

    @property
    def parts(self) -> tuple[ScorerBase, ...]:
        return self.all_of


Scorer = Annotated[Single | All, Field(discriminator="kind")]
