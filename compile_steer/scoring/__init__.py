"""How much of a behaviour a reply shows, 0 to 1: the recipe's `validate.score`."""

from typing import Annotated

from pydantic import Field

from compile_steer.scoring.reply import Reply, Score, ScorerBase
from compile_steer.scoring.text import Keywords, Length, Lowercase, repetition

Scorer = Annotated[Keywords | Lowercase | Length, Field(discriminator="kind")]

__all__ = ["Keywords", "Length", "Lowercase", "Reply", "Score", "Scorer", "ScorerBase", "repetition"]
