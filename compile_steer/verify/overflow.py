"""Which module's numbers have left the range: NaN or infinity as they are computed, or more than half precision holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common.errors import ArtifactError
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, final_states
from compile_steer.models.tokens import Encoded

HALF = float(torch.finfo(torch.float16).max)
_TEXTS = 4  # what overflows does so on any text: the largest activations are those of a text's first token


def require_finite(folder: Path, artifact: LoadedModel, texts: Sequence[Encoded], states: FinalStates) -> None:
    """Weights that have overflowed compare with nothing: that is damage, not a divergence.

    Args:
        states: what `artifact` computes on `texts`.

    Raises:
        ArtifactError: some of it is NaN or infinite; the first module that computes it is named.
    """
    broken = sum(int((~torch.isfinite(one).all(dim=-1)).sum()) for one in (states.response, states.prompt))
    if broken:
        name, _size = first_beyond(artifact, texts, float("inf")) or ("the head", float("nan"))
        raise ArtifactError(
            f"{folder} computes NaN or infinity at {broken} of {len(states.response) + len(states.prompt)} held-out tokens, "
            f"first in {name}; its weights have overflowed. Compile again, or merge at a wider precision."
        )


def require_half_range(folder: Path, artifact: LoadedModel, texts: Sequence[Encoded]) -> None:
    """Raise `ArtifactError` where a module's output is beyond half precision: whoever computes in fp16 gets infinity there.

    The judge computes in the recipe's dtype, where it would not be seen.
    """
    found = first_beyond(artifact, texts[:_TEXTS], HALF)
    if found is not None:
        name, size = found
        raise ArtifactError(
            f"{folder}: the output of {name} reaches {size:.4g} on held-out texts, beyond {HALF:g}, the largest of fp16: "
            "computed in fp16 it is infinite. Ship merged-bf16 or merged-fp32."
        )


def first_beyond(loaded: LoadedModel, texts: Sequence[Encoded], limit: float) -> tuple[str, float] | None:
    """The first module, in the order of computation, whose output is NaN or not below `limit` in size on a text, and
    the largest absolute value there; None where all stay below."""
    found: list[tuple[str, float]] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(value, Tensor) and value.is_floating_point():
                largest = float(value.abs().max())  # NaN where one is
                if not largest < limit:
                    found.append((name, largest))

        return hook

    modules = [(name, module) for name, module in loaded.model.named_modules() if name]
    handles = [module.register_forward_hook(watch(name)) for name, module in modules]
    try:
        for text in texts:  # one at a time: what stands at padding is no part of a text
            final_states(loaded, [text])
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None
