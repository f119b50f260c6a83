"""The sections of a recipe: every option of every stage, with its type and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from compile_steer.activations import Readout
from compile_steer.errors import ArtifactError
from compile_steer.program import Point, parse_positions
from compile_steer.scoring import Scorer

BackendName = Literal["bias", "orthogonalise", "retarget", "closed_form", "distill", "full", "full_cut"]
Form = Literal["adapter", "merged-fp32", "merged-bf16"]
Method = Literal["mean_difference", "pca", "logistic"]


class Section(BaseModel):
    """Keys that are not known are errors, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """JSONL files; see the recipes for one line of each."""

    train: Path
    validation: Path
    test: Path
    neutral: Path
    heldout: Path
    calibration: Path
    positive_template: str = "{prompt}"
    negative_template: str = "{prompt}"

    def files(self, folder: Path) -> dict[str, Path]:
        names = ("train", "validation", "test", "neutral", "heldout", "calibration")
        return {name: folder / getattr(self, name) for name in names}


class Extract(Section):
    """How a direction is read off contrast pairs."""

    method: Method = "mean_difference"
    readout: Readout = "response_mean"
    point: Point = "resid_post"
    pairs: int | None = Field(None, ge=2, description="use only the first so many training pairs")
    shuffled: int = Field(12, ge=5, description="directions from shuffled labels, as controls")


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

    @field_validator("positions")
    @classmethod
    def _parses(cls, positions: str) -> str:
        try:
            parse_positions(positions)
        except ArtifactError as error:
            raise ValueError(str(error)) from error
        return positions


class Calibration(Section):
    """The texts that the compiler sees: the steered model's own continuations of calibration prompts."""

    prompts: int = Field(180, ge=1)
    max_new_tokens: int = Field(48, ge=1)
    batch: int = Field(96, ge=1, description="prompts continued at once")


class ClosedFormStage(Section):
    """One regression: a writer of the block `offset` after the first intervened one, cut to `rank`."""

    offset: int = Field(ge=0)
    writer: Literal["attn", "mlp"]
    rank: int = Field(ge=1)


class ClosedForm(Section):
    """Which writers are solved for, in which order of blocks."""

    stages: tuple[ClosedFormStage, ...] | None = Field(
        None,
        min_length=1,
        description="within a block in this order, a writer named again is solved anew; None: by the program",
    )


class Training(Section):
    """Training end to end: for how long, and within which memory."""

    epochs: float = Field(2.0, gt=0, description="passes over the training texts")
    learning_rate: float = Field(0.02, gt=0)
    batch_tokens: int = Field(1024, ge=64, description="padded tokens that are run at once")
    accumulate: int = Field(1, ge=1, description="batches to a step")
    checkpoint_blocks: bool = Field(False, description="keep each block's input alone, compute the rest again")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the student's matrix products")
    neutral_weight: float = Field(
        0.0, ge=0, description="of being further from the base, on its own texts, than steering is"
    )
    save_every: int = Field(50, ge=1, description="steps after which the state is kept, to go on from")


class Distill(Training):
    """Training: each intervened block on its own output, then end to end.

    `start` random is the baseline: rank-`rank` edits of all Linears from the block on, end to end alone.
    """

    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon", "hidden", "likelihood"] = "forward_kl"
    start: Literal["closed_form", "random"] = "closed_form"
    rank: int = Field(8, ge=1)
    prompts: int = Field(60, ge=1, description="calibration prompts kept for training, unseen by the closed form")
    block_steps: int = Field(800, ge=0, description="steps of one block's own training; 0: the closed form alone")
    block_batch_tokens: int = Field(512, ge=64)
    block_learning_rate: float = Field(0.3, gt=0)


class Full(Training):
    """Whole weights trained end to end, on the texts of the closed form and of `distill`.

    `cut_rank` is `full_cut`'s: the result as a LoRA.
    """

    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon", "hidden"] = "forward_kl"
    optimizer: Literal["apollo", "adamw"] = "apollo"
    modules: tuple[str, ...] = Field(
        (), description="endings of module names, as mlp.down_proj; none: every Linear from the first steered block on"
    )
    learning_rate: float = Field(0.001, gt=0, description="relative to the root mean square of each weight")
    apollo_rank: int = Field(8, ge=1, description="of the optimizer's random subspace; 1: APOLLO-Mini")
    cut_rank: int = Field(8, ge=1)


class Compile(Section):
    """Backends, and the texts they are fitted to."""

    backends: tuple[BackendName, ...] | Literal["auto"] = "auto"
    calibration: Calibration = Calibration()
    closed_form: ClosedForm = ClosedForm()
    distill: Distill = Distill()
    full: Full = Full()


class Gates(Section):
    """What a compiled artifact must reach (nats a token; shares of KL(steered||base))."""

    exact_kl: float = Field(1e-6, gt=0)
    exact_top1: float = Field(0.999, gt=0, le=1)
    share: float = Field(0.02, gt=0)
    top1: float = Field(0.95, gt=0, le=1)
    recovery: float = Field(0.95, gt=0)
    recovery_low: float = Field(0.90, gt=0)
    drift_margin: float = Field(0.01, ge=0)
    score_margin: float = Field(0.1, gt=0)


class Verify(Section):
    """Which forms are judged, on how much, and by which gates."""

    forms: tuple[Form, ...] = Field(("adapter", "merged-fp32", "merged-bf16"), min_length=1)
    max_new_tokens: int = Field(48, ge=4)
    heldout: int = Field(40, ge=8, description="held-out prompts continued by the steered model, for the KL")
    pairs: int = Field(40, ge=8, description="test pairs, for the recovery")
    neutral: int = Field(30, ge=8, description="neutral texts, for the drift")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    gates: Gates = Gates()
