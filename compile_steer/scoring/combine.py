"""Several scorers as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.scoring.choice import Choice
from compile_steer.scoring.classifier import Classifier
from compile_steer.scoring.ifeval import IFEval
from compile_steer.scoring.judge import Judge
from compile_steer.scoring.likelihood import Ended, Perplexity
from compile_steer.scoring.reply import Reply, Score, ScorerBase
from compile_steer.scoring.text import Keywords, Length, Lowercase, Repetition

Single = (
    Keywords | Lowercase | Length | Repetition | Perplexity | Ended | IFEval | Choice | Classifier | Judge
)  # what `kind` chooses from


class All(ScorerBase):
    """The least of the parts' scores: a reply must show all of `all_of`.

    Wrong where one part hardly ever fires: it hides what the others would have shown. A judge among the parts is asked
    only about replies to which the others give more than 0.
    """

    kind: Literal["all"]
    all_of: tuple[Annotated[Single, Field(discriminator="kind")], ...] = Field(min_length=2)

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        # Stable: what costs a request comes last.
        parts = [part.bind(loaded, behaviour) for part in sorted(self.all_of, key=lambda part: part.kind == "judge")]

        def score(replies: Sequence[Reply]) -> np.ndarray:
            least = np.ones(len(replies))
            for part in parts:
                left = np.flatnonzero(least > 0)
                if len(left):
                    least[left] = np.minimum(least[left], part([replies[int(index)] for index in left]))
            return least

        return score

    @property
    def of_any_prompt(self) -> bool:
        return all(part.of_any_prompt for part in self.all_of)

    def on_texts(self) -> ScorerBase | str:
        kept = [part.on_texts() for part in self.all_of]
        able = tuple(part for part in kept if not isinstance(part, str))
        if not able:
            return "; ".join(dict.fromkeys(str(reason) for reason in kept))
        return able[0] if len(able) == 1 else self.model_copy(update={"all_of": able})
