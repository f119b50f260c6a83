"""`validate`: the sweep, and what the test must show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from compile_steer.common.errors import ArtifactError
from compile_steer.common.options import Section
from compile_steer.scoring.options import Scorer
from compile_steer.steering.sites import parse_positions


class Target(Section):
    """A coefficient that a solver finds, layer by layer, in place of a grid: one of the two keys."""

    ceiling: float | None = Field(None, gt=1, description="the largest whose neutral perplexity ratio is at most this")
    kl: float | None = Field(None, gt=0, description="the one with KL(steered||base) of so many nats a neutral token")

    @model_validator(mode="after")
    def _one(self) -> Target:
        if (self.ceiling is None) == (self.kl is None):
            raise ValueError("give a list of coefficients, or {ceiling: RATIO}, or {kl: NATS}")
        return self


class Claim(Section):
    """The least change that is worth seeing: how many pairs and prompts it takes is said before the run."""

    contrast: float = Field(0.1, gt=0, description="nats a token")
    score: float = Field(0.2, gt=0, le=1)


class Validate(Section):
    """The sweep on validation data, and what the test must show."""

    score: Scorer
    layers: tuple[int, ...] | Literal["auto", "search"] = Field(
        "auto", description="auto: five from 30 % to 70 % of the depth; search: successive halving over all blocks"
    )
    coefficients: Annotated[
        Annotated[tuple[float, ...], Field(min_length=1), Tag("list")] | Annotated[Target, Tag("target")],
        Discriminator(lambda given: "target" if isinstance(given, dict | Target) else "list"),
    ] = (0.5, 1.0, 1.5, 2.0)
    positions: str = "all"
    sweep_pairs: int = Field(24, ge=4)
    sweep_neutral: int = Field(12, ge=4, description="neutral texts of the sweep; the test uses all")
    sweep_prompts: int = Field(12, ge=4)
    sweep_layers: int = Field(2, ge=1, description="how many of the best layers are also scored by generation")
    control_pairs: int = Field(24, ge=4)
    pairs: int = Field(200, ge=4, description="test pairs measured, at most")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    max_new_tokens: int = Field(40, ge=4)
    random_directions: int = Field(20, ge=20)
    max_perplexity_ratio: float = Field(1.5, gt=1)
    max_repetition: float = Field(0.2, gt=0, lt=1)
    min_score: float = Field(0.0, ge=0, le=1, description="the least generation score that is worth compiling")
    instruction: str = Field("", description="what one would ask instead of steering: the prompt-only baseline")
    few_shot: int = Field(3, ge=0, description="training positives shown as turns before the prompt: another baseline")
    mismatched: Path | None = Field(None, description="pairs of another behaviour, as JSONL: a control direction")
    dose_prompts: int = Field(8, ge=2, description="test prompts, their pairs, and neutral texts of the dose-response")
    claim: Claim = Claim()

    @field_validator("coefficients")
    @classmethod
    def _nonzero(cls, values: tuple[float, ...] | Target) -> tuple[float, ...] | Target:
        if isinstance(values, tuple) and any(value == 0 for value in values):
            raise ValueError("a coefficient of 0 steers nothing; the base is measured anyway")
        return values

    @field_validator("layers")
    @classmethod
    def _some(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if layers == () or (isinstance(layers, tuple) and min(layers) < 0):
            raise ValueError("give block numbers from 0 on, 'auto' or 'search'")
        return layers

    @model_validator(mode="after")
    def _reaches_the_choice(self) -> Self:
        parts = self.score.all_of if self.score.kind == "all" else (self.score,)
        if any(part.kind == "choice" for part in parts) and parse_positions(self.positions) == {"response"}:
            raise ValueError("a choice is made at the prompt's last token, which positions 'response' do not steer")
        return self

    @field_validator("positions")
    @classmethod
    def _parses(cls, positions: str) -> str:
        try:
            parse_positions(positions)
        except ArtifactError as error:
            raise ValueError(str(error)) from error
        return positions
