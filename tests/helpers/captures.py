"""The residual stream of a tiny model, recorded independently of `Layout`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compile_steer.steering.sites import Site

# The module whose input is the residual stream between the attention and the MLP; None where both
# sublayers read the block's input and are added at once.
MIDSTREAM: dict[str, str | None] = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "granite", "smollm3", "phi3", "qwen3_moe", "gpt_oss"),
        "post_attention_layernorm",
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), "pre_feedforward_layernorm"),
    "gpt2": "ln_2",
    "olmo2": "mlp",
    "phi": None,
    "gpt_neox": None,
}
BLOCKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
PARALLEL_WRITERS = {"phi": ("self_attn.dense", "mlp.fc2"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")}


@dataclass(frozen=True)
class Streams:
    """Activations of one pass by block: input, between the sublayers, output, and both sublayers' shares."""

    before: dict[int, Tensor]
    middle: dict[int, Tensor]
    after: dict[int, Tensor]
    attn: dict[int, Tensor]
    mlp: dict[int, Tensor]

    def at(self, site: Site) -> Tensor:
        kinds = {"resid_pre": self.before, "attn_out": self.attn, "mlp_out": self.mlp, "resid_post": self.after}
        return kinds[site.point][site.layer]


def blocks_of(family: str, model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(BLOCKS.get(family, "model.layers")).children())


@contextmanager
def captured(family: str, model: nn.Module) -> Iterator[Streams]:
    """Record the residual stream of the passes inside the block, independently of `Layout`."""
    found = Streams({}, {}, {}, {}, {})
    handles = []

    def keep_input(into: dict[int, Tensor], layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def keep_output(into: dict[int, Tensor], layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            into[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer, block in enumerate(blocks_of(family, model)):
        handles.append(block.register_forward_pre_hook(keep_input(found.before, layer), with_kwargs=True))
        handles.append(block.register_forward_hook(keep_output(found.after, layer)))
        middle = MIDSTREAM[family]
        if middle is not None:
            module = block.get_submodule(middle)
            handles.append(module.register_forward_pre_hook(keep_input(found.middle, layer), with_kwargs=True))
        else:
            for name, into in zip(PARALLEL_WRITERS[family], (found.attn, found.mlp), strict=True):
                handles.append(block.get_submodule(name).register_forward_hook(keep_output(into, layer)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for layer, middle_state in found.middle.items():
        found.attn[layer] = middle_state - found.before[layer]
        found.mlp[layer] = found.after[layer] - middle_state


def n_hooks(model: nn.Module) -> int:
    """Every forward hook that hangs anywhere in the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
