"""`verify`: which forms are judged, on how much, and by which gates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from compile_steer.common.options import Section

Form = Literal["adapter", "merged-fp32", "merged-bf16", "merged-fp16", "gguf-f16", "gguf-q8_0", "gguf-q4_0"]


def any_gguf(forms: Iterable[Form]) -> bool:
    """True if a file for llama.cpp is among the forms."""
    return any(form.startswith("gguf-") for form in forms)


class Gates(Section):
    """What a compiled artifact must reach (nats a token; shares of KL(steered||base))."""

    exact_kl: float = Field(1e-6, gt=0)
    exact_top1: float = Field(0.999, gt=0, le=1)
    share: float = Field(0.02, gt=0)
    top1: float = Field(0.95, gt=0, le=1)
    recovery: float = Field(0.95, gt=0)
    recovery_low: float = Field(0.90, gt=0)
    drift_margin: float = Field(0.01, ge=0)
    effect_margin: float = Field(
        0.2, gt=0, le=1, description="the share of the steered effect that counts as no difference"
    )
    score_margin: float = Field(0.05, gt=0, le=1, description="and at most so many points of the score")


class Verify(Section):
    """Which forms are judged, on how much, and by which gates."""

    forms: tuple[Form, ...] = Field(("adapter", "merged-fp32", "merged-bf16"), min_length=1)
    max_new_tokens: int = Field(48, ge=4)
    heldout: int = Field(40, ge=8, description="held-out prompts continued by the steered model, for the KL")
    pairs: int = Field(40, ge=8, description="test pairs, for the recovery")
    neutral: int = Field(30, ge=8, description="neutral texts, for the drift")
    prompts: int = Field(32, ge=8, description="test prompts answered in full")
    kinds: int = Field(
        2, ge=1, description="prompts of each kind: held-out, off-topic, multi-turn; answered freely too"
    )
    long: int = Field(1, ge=0, description="prompts of at least long_tokens tokens, made of the neutral texts")
    long_tokens: int = Field(1000, ge=16)
    free_tokens: int = Field(16, ge=4, description="of an answer to these prompts")
    capability: Literal[0] | Annotated[int, Field(ge=2, le=24)] = Field(
        24, description="short questions with one right answer, of 24: what the model can still do; 0 asks none"
    )
    gates: Gates = Gates()
