"""What every section of a recipe has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys that are not known are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
