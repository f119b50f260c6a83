"""`retarget`: a checkpoint without biases becomes the stock architecture that computes the same and has them. Exact.

`LlamaForCausalLM` with `attention_bias` and `mlp_bias` computes what Mistral and Qwen2 compute where no
sliding window acts, from tensors of the same names; biases that the checkpoint lacks are zero.
"""

from __future__ import annotations

from dataclasses import replace

from compile_steer.lower import bias
from compile_steer.lower.job import Job
from compile_steer.steering.layout import FAMILIES, Layout
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program

_SOURCES = ("mistral", "qwen2")
_TARGET = "llama"


def refusal(program: Program, layout: Layout) -> str | None:
    """Why the model cannot be rewritten so that a bias holds the (canonical) program, or None."""
    config = layout.model.config
    if config.model_type == _TARGET:
        return f"it is {_TARGET} already"
    if config.model_type not in _SOURCES:
        return f"{config.model_type} is not one of the families that {_TARGET}'s stock code computes ({', '.join(_SOURCES)})"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        return f"its sliding window of {window} tokens is not in {_TARGET}'s stock code"
    return bias.refusal(program, _as_target(layout))


def _as_target(layout: Layout) -> Layout:
    return replace(layout, family=FAMILIES[_TARGET])


def adapter_refusal(program: Program, layout: Layout) -> str | None:
    """Why the result cannot ship as a stock PEFT adapter."""
    return bias.adapter_refusal(program, layout)


def lower(job: Job) -> WeightPatch:
    """Return the biases, with the architecture that holds them."""
    return replace(bias.shifts(job.program, _as_target(job.loaded.layout)), architecture=_TARGET)
