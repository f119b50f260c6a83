"""`compile`: the backends, and the texts they are fitted to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from compile_steer.common.options import Section, each_once

BackendName = Literal["bias", "orthogonalise", "retarget", "closed_form", "distill", "full", "full_cut"]


class CalibrationOptions(Section):
    """The texts that the compiler sees: the steered model's own continuations of calibration prompts."""

    prompts: int = Field(180, ge=1, description="calibration prompts that the closed form is fitted to")
    max_new_tokens: int = Field(48, ge=1, le=100_000, description="length of a continuation")
    batch: int = Field(96, ge=1, description="prompts continued at once")
    max_context: int = Field(
        2048,
        ge=16,
        le=1_000_000,
        description="tokens that the texts are joined to, in conversations and documents of many lengths; at most the model's",
    )


class ClosedFormStage(Section):
    """One regression: output projections of the block `offset` after the first intervened one, cut to `rank`."""

    offset: int = Field(ge=0, description="blocks above the first intervened one")
    projection: Literal["attn", "mlp", "both"] = Field(
        description="the attention's output projection, the MLP's, or both together with what reads the MLP's input"
    )
    rank: int = Field(ge=1, description="of the edit")


class ClosedFormOptions(Section):
    """Which output projections are solved for, in which order of blocks."""

    stages: tuple[ClosedFormStage, ...] | None = Field(
        None,
        min_length=1,
        description="within a block in this order, a projection named again is solved again; None: by the program",
    )


class TrainingOptions(Section):
    """Training end to end: on what, for how long, and within which memory."""

    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon", "hidden", "likelihood"] = Field(
        "forward_kl", description="what end-to-end training minimises; likelihood is the baseline, by TRL"
    )
    epochs: float = Field(2.0, gt=0, description="passes over the training texts")
    learning_rate: float = Field(0.02, gt=0, description="relative to the rows and columns of each low-rank factor")
    batch_tokens: int = Field(1024, ge=64, description="padded tokens that are run at once")
    accumulate: int = Field(1, ge=1, description="batches to a step")
    recompute_every: int = Field(
        2, ge=0, description="recompute every so many-th block for the gradient instead of keeping it; 0: none"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the student's matrix products")
    base_kl_weight: float = Field(
        0.0, ge=0, description="of KL(base || student) beyond KL(base || steered), on texts that the base writes"
    )
    save_every: int = Field(50, ge=1, description="steps after which the state is saved, so that a stopped run resumes")


class DistillOptions(TrainingOptions):
    """Training: each intervened block on its own output, then end to end.

    `start` random is the baseline: rank-`rank` edits of all Linears from the block on, end to end alone.
    """

    start: Literal["closed_form", "random"] = Field("closed_form", description="the patch before training")
    rank: int = Field(8, ge=1, description="of the edit of each Linear")
    prompts: int = Field(60, ge=1, description="calibration prompts kept for training, unseen by the closed form")
    block_steps: int = Field(800, ge=0, description="steps of one block's own training; 0: the closed form alone")
    block_batch_tokens: int = Field(512, ge=64, description="padded tokens of one such step")
    block_learning_rate: float = Field(0.1, gt=0, description="of these steps")
    shard: bool = Field(
        False, description="lay each block of the base over all processes (FSDP2) once the texts are written"
    )


class FullOptions(TrainingOptions):
    """Whole weights trained end to end, on the texts of the closed form and of `distill`.

    `cut_rank` is `full_cut`'s: the result as a LoRA.
    """

    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon", "hidden"] = Field(
        "forward_kl", description="what training minimises"
    )
    optimizer: Literal["apollo", "adamw"] = Field("apollo", description="APOLLO keeps a fraction of AdamW's state")
    modules: tuple[str, ...] = Field(
        (), description="endings of module names, as mlp.down_proj; none: every Linear from the first steered block on"
    )
    learning_rate: float = Field(0.001, gt=0, description="relative to the root mean square of each weight")
    apollo_rank: int = Field(8, ge=1, description="of the optimizer's random subspace; 1: APOLLO-Mini")
    cut_rank: int = Field(8, ge=1, description="rank that full_cut leaves of each matrix")


class CompileOptions(Section):
    """Backends, and the texts they are fitted to."""

    backends: tuple[BackendName, ...] | Literal["auto"] = Field(
        "auto", description="auto: the first that is possible, exact ones first"
    )
    dial: bool = Field(
        False,
        description="make edits in proportion to the coefficient, so that an adapter's scale is one; they are less exact at scale 1",
    )
    calibration: CalibrationOptions = CalibrationOptions()
    closed_form: ClosedFormOptions = ClosedFormOptions()
    distill: DistillOptions = DistillOptions()
    full: FullOptions = FullOptions()

    _backends = field_validator("backends")(each_once)
