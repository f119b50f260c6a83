"""What a scorer is, and the check that it can tell the two sides of the data apart.

No module of a scorer imports torch, transformers, scikit-learn or openai before it is bound: recipes import them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compile_steer.common.errors import RecipeError
from compile_steer.common.options import Section

if TYPE_CHECKING:
    from compile_steer.data.behaviour import Behaviour
    from compile_steer.models.load import LoadedModel


@dataclass(frozen=True)
class Reply:
    """A model's reply to a plain prompt, and whether it ended by itself before the limit of new tokens."""

    prompt: str
    text: str
    ended: bool


Score = Callable[[Sequence[Reply]], np.ndarray]
"""[n] replies -> [n] scores in 0 to 1: how much of the behaviour each shows."""


class ScorerBase(Section, ABC):
    """A section of the recipe that specifies how replies are scored."""

    unfit_for_data_texts: ClassVar[str] = ""
    """Why the responses in the data cannot be scored; empty if they can."""

    @abstractmethod
    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        """Return the score itself, with what it needs of the model and the data.

        Args:
            loaded: the base model, whichever model writes the replies.

        Raises:
            RecipeError: this data cannot be scored so.
        """

    @property
    def needs_no_labels(self) -> bool:
        """True if a reply to a prompt that is not in the data can be scored too, here and at no cost."""
        return True

    @property
    def revision(self) -> str:
        """Of the local model that scores, '' where there is none: the recipe has its path alone. Raises `ArtifactError`."""
        return "".join(part.revision for part in self.parts if part is not self)

    @property
    def parts(self) -> tuple[ScorerBase, ...]:
        """The scorers that a reply must satisfy; one but for `all`."""
        return (self,)


def require_discrimination(scorer: ScorerBase, score: Score, loaded: LoadedModel, behaviour: Behaviour) -> str:
    """Score both sides' responses of the validation pairs; returns why that is not possible, empty if it was done.

    Args:
        score: the `scorer` bound to this model and data.

    Raises:
        RecipeError: every text has the same score, or the negative ones have a higher mean.
    """
    usable, pairs = [part for part in scorer.parts if not part.unfit_for_data_texts], behaviour.validation
    if not usable:
        return "; ".join(dict.fromkeys(part.unfit_for_data_texts for part in scorer.parts))
    # Such pairs differ in their prompts (an instruction, a system prompt), which no score of replies can see.
    if all(pair.positive.response == pair.negative.response for pair in pairs):
        return "the two sides of the pairs have the same responses, or none"
    # All of them ended, so that this cannot be what tells the sides apart.
    texts = [Reply(pair.prompt, pair.positive.response, True) for pair in pairs]
    texts += [Reply(pair.prompt, pair.negative.response, True) for pair in pairs]
    if len(usable) < len(scorer.parts):  # without those that need a model's reply or cost requests
        part = usable[0] if len(usable) == 1 else scorer.model_copy(update={"all_of": tuple(usable)})
        score = part.bind(loaded, behaviour)
    positive, negative = np.split(score(texts), 2)
    if np.ptp([*positive, *negative]) == 0:
        reason = {0.0: "it never fires", 1.0: "it always fires"}.get(float(positive[0]), "it sees no difference")
        raise RecipeError(
            f"validate.score gives {positive[0]:.2f} to all {len(texts)} texts of data.validation, on both sides: "
            f"{reason}, so it cannot detect an effect of steering. Fix validate.score, or the data."
        )
    if negative.mean() > positive.mean():
        raise RecipeError(
            f"validate.score gives the negative texts of data.validation more than the positive ones, "
            f"{negative.mean():.2f} and {positive.mean():.2f} on average: it scores the opposite of the behaviour. Fix "
            "validate.score, or swap the two sides."
        )
    return ""
