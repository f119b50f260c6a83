"""`validate`: the sweep, and what the test must show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from compile_steer.common.errors import ArtifactError
from compile_steer.common.options import Section
from compile_steer.scoring.model_based import Choice
from compile_steer.scoring.options import Scorer
from compile_steer.steering.sites import parse_positions


class SolverTarget(Section):
    """What a solver reaches by choosing the coefficient of each layer, in place of a grid: one of the two keys."""

    perplexity_limit: float | None = Field(
        None, gt=1, description="the largest coefficient whose perplexity on control text is at most this ratio"
    )
    kl: float | None = Field(
        None, gt=0, description="the coefficient whose KL(steered‖base) on control text is this, in nats per token"
    )

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.perplexity_limit is None) == (self.kl is None):
            raise ValueError("give a list of coefficients, or {perplexity_limit: RATIO}, or {kl: NATS}")
        return self


class MinimumEffect(Section):
    """The smallest changes worth detecting. How many pairs and prompts they need is printed before the sweep."""

    margin: float = Field(0.1, gt=0, description="of the log-likelihood margin, in nats per token")
    score: float = Field(0.2, gt=0, le=1, description="of the mean score")


class Tolerances(Section):
    """How many fewer of each the steered model may have than the base, as fractions of all; 1 allows anything.

    A tolerance fails the verdict where the measured loss is above it and is no chance (sign flips, 5 %).
    """

    answers: float = Field(0.25, gt=0, le=1, description="plain questions that it answers right")
    right_answers: float = Field(0.1, gt=0, le=1, description="likelihood of their right answers, among wrong ones")
    refusals: float = Field(0.1, gt=0, le=1, description="harmless prompts that it does not refuse")
    language: float = Field(0.1, gt=0, le=1, description="answers in the language of the base's answer")
    instructions: float = Field(0.25, gt=0, le=1, description="plain instructions that it follows")


class ValidateOptions(Section):
    """The sweep on validation data, and what the test must show."""

    score: Scorer = Field(description="how much of the behaviour a reply shows, 0 to 1")
    layers: tuple[int, ...] | Literal["auto", "search"] = Field(
        "auto", description="auto: five from 30 % to 70 % of the depth; search: successive halving over all blocks"
    )
    # The tags decide by the type of the value, so that an error names the one alternative that was meant.
    coefficients: Annotated[
        Annotated[tuple[float, ...], Field(min_length=1), Tag("list")] | Annotated[SolverTarget, Tag("target")],
        Discriminator(lambda value: "target" if isinstance(value, dict | SolverTarget) else "list"),
    ] = Field((0.5, 1.0, 1.5, 2.0), description="a grid, or a target for a solver")
    positions: str = Field("all", description="the tokens that the program acts on")
    sweep_pairs: int = Field(24, ge=4, description="validation pairs that every grid point is measured on")
    sweep_neutral: int = Field(12, ge=4, description="control texts of the sweep; the test uses all")
    sweep_prompts: int = Field(12, ge=4, description="validation prompts answered at the best layers")
    sweep_layers: int = Field(2, ge=1, description="how many of the best layers are also scored by generation")
    control_pairs: int = Field(24, ge=4, description="test pairs that the control directions are measured on")
    pairs: int = Field(200, ge=4, description="test pairs measured, at most")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    max_new_tokens: int = Field(40, ge=4, le=100_000, description="length of an answer")
    random_directions: int = Field(20, ge=20, le=1000, description="random control directions of the same strength")
    max_perplexity_ratio: float = Field(1.5, gt=1, description="perplexity limit: on control text, over the base's")
    max_repetition: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="largest fraction of an answer's 3-grams that repeat; where the base repeats itself more, that is the limit",
    )
    questions: int = Field(48, ge=4, le=48, description="plain questions asked, to see what steering costs")
    control_prompts: int = Field(
        12, ge=4, description="control prompts answered freely, and as many instructions, for that"
    )
    tolerances: Tolerances = Tolerances()
    wordings: int = Field(
        6, ge=0, description="test pairs whose prompts are put in other words, to see where the effect holds"
    )
    min_score: float = Field(0.0, ge=0, le=1, description="smallest generation score that is worth compiling")
    instruction: str = Field("", description="a request for the behaviour in the prompt, as a baseline")
    few_shot: int = Field(3, ge=0, description="training positives shown as turns before the prompt, as a baseline")
    other_behaviour: Path | None = Field(None, description="pairs of another behaviour, as JSONL: a control direction")
    dose_prompts: int = Field(
        8, ge=2, description="test prompts, their pairs, and control texts of the coefficient sweep"
    )
    minimum_effect: MinimumEffect = Field(MinimumEffect(), description="of the power analysis")

    @field_validator("coefficients")
    @classmethod
    def _not_zero(cls, values: tuple[float, ...] | SolverTarget) -> tuple[float, ...] | SolverTarget:
        if isinstance(values, tuple) and any(value == 0 for value in values):
            raise ValueError("a coefficient of 0 steers nothing; the base is measured anyway")
        return values

    @field_validator("layers")
    @classmethod
    def _not_empty(cls, layers: tuple[int, ...] | str) -> tuple[int, ...] | str:
        if isinstance(layers, tuple) and (not layers or min(layers) < 0 or len(set(layers)) < len(layers)):
            raise ValueError("give block numbers from 0 on, each once, or 'auto' or 'search'")
        return layers

    @field_validator("positions")
    @classmethod
    def _parses(cls, positions: str) -> str:
        try:
            parse_positions(positions)
        except ArtifactError as error:
            raise ValueError(str(error)) from error
        return positions

    @model_validator(mode="after")
    def _steers_the_choice(self) -> Self:
        if any(isinstance(part, Choice) for part in self.score.parts) and parse_positions(self.positions) == {
            "response"
        }:
            raise ValueError("a choice is made at the prompt's last token, which positions 'response' do not steer")
        return self


def repetition_limit(options: ValidateOptions, base: float) -> float:
    """The largest repetition of steered answers: a base that repeats itself more than is allowed is not steering's fault."""
    return max(options.max_repetition, base)
