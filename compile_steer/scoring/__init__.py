"""How much of a behaviour a reply shows, 0 to 1: the recipe's `validate.score`."""

from typing import Annotated

from pydantic import Field

from compile_steer.scoring.check import Discrimination, require_discrimination
from compile_steer.scoring.choice import Choice, letter_tokens
from compile_steer.scoring.classifier import Classifier
from compile_steer.scoring.combine import All, Single
from compile_steer.scoring.ifeval import IFEval
from compile_steer.scoring.judge import Judge
from compile_steer.scoring.likelihood import Ended, Perplexity
from compile_steer.scoring.reply import Reply, Score, ScorerBase
from compile_steer.scoring.text import Keywords, Length, Lowercase, Repetition, repetition

Scorer = Annotated[Single | All, Field(discriminator="kind")]

__all__ = [
    "All",
    "Choice",
    "Classifier",
    "Discrimination",
    "Ended",
    "IFEval",
    "Judge",
    "Keywords",
    "Length",
    "Lowercase",
    "Perplexity",
    "Repetition",
    "Reply",
    "Score",
    "Scorer",
    "ScorerBase",
    "letter_tokens",
    "repetition",
    "require_discrimination",
]
