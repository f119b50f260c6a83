"""What an artifact's precision costs by itself, apart from the compile; and numbers that a precision cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from torch import Tensor, nn

from compile_steer.artifacts.files import digest
from compile_steer.common.errors import ArtifactError
from compile_steer.models.gguf import gguf_in, stored_types
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, final_states
from compile_steer.models.tokens import Encoded
from compile_steer.verification.parity import Rounding

if TYPE_CHECKING:
    from compile_steer.verification.reference import Reference

_CASTS = {"merged-bf16": torch.bfloat16, "merged-fp16": torch.float16}
HALF = float(torch.finfo(torch.float16).max)
_TEXTS = 4  # what overflows does so on any text: the largest activations are those of a text's first token


def rounding_of(form: str, folder: Path, base: LoadedModel) -> tuple[str, Callable[[str, Tensor], Tensor]] | None:
    """How `folder`, of that form, stores the base's weights: a function of a parameter's name and values, and a text that
    tells it from other ways. None where it keeps all bits."""
    if form in _CASTS:
        dtype = _CASTS[form]
        return str(dtype), lambda _name, values: values.to(dtype)
    file = gguf_in(folder)
    if file is None:
        return None
    # Tensor by tensor from the file itself: llama.cpp stores what does not divide into blocks in more bits.
    kinds = stored_types(file, base.model)

    def quantized(name: str, values: Tensor) -> Tensor:
        kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
        stored = gguf.quantize(values.float().cpu().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(stored, kind).reshape(tuple(values.shape)))

    return digest(sorted((name, kind.name) for name, kind in kinds.items())), quantized


def measure_rounding(
    reference: Reference, quantized: Reference, artifact: LoadedModel, states: FinalStates, *, quantising: bool
) -> Rounding:
    """What rounding the weights costs by itself, and what the compile costs without it.

    Two references answer two questions. Against the steered model in full precision an artifact shows all that its user
    gets, the rounding's cost with the compile's. Against the hooks on the base rounded the same way, `quantized`, it shows the
    compile alone: every matrix that the compile did not edit is then the same on both sides, bit for bit. `states` are the
    artifact's, on the held-out texts. What the edited matrices' rounding costs is measured where `quantising`, for a gate.
    """
    rounded, (base, noise) = quantized.model, quantized.rounding_alone
    compiled, changed = quantized.kl_from_steered(artifact, states).mean, quantized.kl_base.mean
    edited = edited_matrices(rounded, artifact)
    return Rounding(
        kl_base=base.mean,
        kl_steered=noise.mean,
        top1_steered=noise.top1_agreement,
        kl=compiled,
        kl_remaining=compiled / changed,
        kl_changed=changed,
        edited=len(edited),
        kl_edited=cost_of_rounding(reference, rounded, edited) if quantising else None,
    )


def edited_matrices(rounded: LoadedModel, artifact: LoadedModel) -> list[str]:
    """The matrices of `artifact` that are not the rounded base's own, by their names."""
    own = dict(rounded.model.named_parameters(remove_duplicate=False))
    matrices = [(name, value) for name, value in artifact.model.named_parameters() if value.ndim > 1]
    return [name for name, value in matrices if not (name in own and torch.equal(value, own[name]))]


def cost_of_rounding(reference: Reference, rounded: LoadedModel, matrices: Sequence[str]) -> float:
    """Mean KL(steered||steered with only these matrices of the base rounded) on the held-out texts, nats per token."""
    if not matrices:
        return 0.0
    base, own = (dict(loaded.model.named_parameters(remove_duplicate=False)) for loaded in (reference.model, rounded))
    kept = {id(own[name]) for name in matrices if name in own}  # a tied head is one parameter of two names
    before = {name: parameter.data for name, parameter in own.items() if id(parameter) not in kept}
    try:
        for name in before:  # all others are the base's own until the states are computed
            own[name].data = base[name].data
        other = replace(rounded, kept=None)  # what is kept is of the rounded base as a whole
        return reference.kl_from_steered(other, final_states(other, reference.heldout, reference.program)).mean
    finally:
        for name, values in before.items():
            own[name].data = values


def require_finite(folder: Path, artifact: LoadedModel, texts: Sequence[Encoded], states: FinalStates) -> None:
    """Raise `ArtifactError` where some of `states`, the artifact's on `texts`, is NaN or infinite: its weights overflowed."""
    # Such weights are damage: no divergence can be computed with them.
    computed = torch.cat([states.response, states.prompt])
    broken = int((~torch.isfinite(computed).all(dim=-1)).sum())
    if broken:
        name, _size = first_beyond(artifact, texts, float("inf")) or ("the head", float("nan"))
        raise ArtifactError(
            f"{folder} computes NaN or infinity at {broken} of {len(computed)} held-out tokens, "
            f"first in {name}; its weights have overflowed. Compile again, or merge at a wider precision."
        )


def require_half_range(folder: Path, artifact: LoadedModel, texts: Sequence[Encoded]) -> None:
    """Raise `ArtifactError` where a module's output is beyond half precision, in which it would be infinite."""
    # The verifier computes in the recipe's dtype, so `require_finite` does not see it.
    overflow = first_beyond(artifact, texts[:_TEXTS], HALF)
    if overflow is not None:
        raise ArtifactError(
            f"{folder}: the output of {overflow[0]} reaches {overflow[1]:.4g} on held-out texts, beyond {HALF:g}, the largest "
            "of fp16: computed in fp16 it is infinite. Ship merged-bf16 or merged-fp32."
        )


def first_beyond(loaded: LoadedModel, texts: Sequence[Encoded], limit: float) -> tuple[str, float] | None:
    """The first module, in the order of computation, whose output is NaN or not below `limit` in size on a text, and the
    largest absolute value there; None where all stay below."""
    beyond: list[tuple[str, float]] = []

    def check(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if not beyond and isinstance(value, Tensor) and value.is_floating_point():
            largest = float(value.abs().max())
            if not largest < limit:  # true of NaN too
                beyond.append((name, largest))

    with ExitStack() as hooks:
        for name, module in loaded.model.named_modules():
            if name:  # the whole model's output is no module's own
                hooks.callback(module.register_forward_hook(partial(check, name)).remove)
        for text in texts:  # one at a time: what a model computes of padding is no part of a text
            final_states(replace(loaded, below=None), [text])  # every block runs
            if beyond:
                break
    return beyond[0] if beyond else None
