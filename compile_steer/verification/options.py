"""`verify`: which forms are verified, on how much, and by which gates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from compile_steer.common.options import Section, each_once

Form = Literal["adapter", "merged-fp32", "merged-bf16", "merged-fp16", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]


def any_gguf(forms: Iterable[Form]) -> bool:
    """True if a file for llama.cpp is among the forms."""
    return any(form.startswith("gguf-") for form in forms)


class Gates(Section):
    """What an artifact must reach; KL in nats per token."""

    # fp32 in another order of summation gives about 1e-11, an error of 1 % of the vector 1e-4 of KL(steered||base).
    exact_kl: float = Field(1e-6, gt=0, description="KL(steered||compiled) of an exact backend")
    exact_top1: float = Field(0.999, gt=0, le=1, description="top-1 agreement of an exact backend")
    kl_remaining: float = Field(
        0.02, gt=0, description="KL(steered||compiled) of other backends, as a fraction of KL(steered||base)"
    )
    top1: float = Field(0.95, gt=0, le=1, description="top-1 agreement of other backends")
    effect_retained: float = Field(0.95, gt=0, description="fraction of the steered effect on the test pairs")
    effect_retained_low: float = Field(0.90, gt=0, description="the same of its lower 95 % bound")
    # Fixed, not a fraction: a program that does nothing to control text leaves no KL to take one of.
    control_kl_margin: float = Field(
        0.01, ge=0, description="KL from the base on control text: so much above the steered model's"
    )
    effect_margin: float = Field(0.2, gt=0, le=1, description="equivalence margin, as a fraction of the steered effect")
    score_margin: float = Field(0.05, gt=0, le=1, description="and at most so many points of the score")
    # A sound adapter of the ocean recipe has been seen to repeat 0.05 more on ten prompts, by chance.
    repetition_margin: float = Field(
        0.05, gt=0, le=1, description="so much more of an answer's 3-grams may be repeats than in the steered model's"
    )


class VerifyOptions(Section):
    """Which forms are verified, on how much, and by which gates."""

    forms: tuple[Form, ...] = Field(
        ("adapter", "merged-fp32", "merged-bf16"),
        min_length=1,
        description="artifact formats that are made and verified",
    )
    max_new_tokens: int = Field(48, ge=4, le=100_000, description="length of a continuation or answer")
    heldout: int = Field(40, ge=8, description="held-out prompts continued by the steered model, for the KL")
    pairs: int = Field(40, ge=8, description="test pairs, for the effect retained")
    neutral: int = Field(30, ge=8, description="control texts, for the KL from the base")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    samples_per_prompt: int = Field(
        8,
        ge=1,
        le=1000,
        description="sampled answers of the steered model to a prompt, at most, that scores are compared on",
    )
    prompts_per_set: int = Field(
        2, ge=1, description="prompts of each set: held-out, off-topic, multi-turn; answered freely too"
    )
    long: int = Field(
        2,
        ge=0,
        description="long conversations of the held-out answers and control texts, for the KL by length of context",
    )
    long_tokens: int = Field(2048, ge=16, le=1_000_000, description="length of these, at most the model's positions")
    free_tokens: int = Field(16, ge=4, le=100_000, description="of an answer to these prompts")
    capability: Literal[0] | Annotated[int, Field(ge=2, le=24)] = Field(
        24, description="short questions with one right answer, of 24, for the capability retention; 0 asks none"
    )
    gates: Gates = Gates()

    _forms = field_validator("forms")(each_once)
