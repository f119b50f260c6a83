"""The recipe's `validate.score`: how much of a behaviour a reply shows, 0 to 1."""

from typing import Annotated

from pydantic import Field

from compile_steer.scoring.combine import All, Single

Scorer = Annotated[Single | All, Field(discriminator="kind")]
