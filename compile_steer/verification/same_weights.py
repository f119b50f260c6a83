"""Whether two models that were loaded from disk have the same weights, with an adapter's counted in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor

from compile_steer.models.load import LoadedModel
from compile_steer.models.reload import ADAPTER

# Of an element, beside itself and the root mean square of its tensor: sums in another order in float32. An error of 1 % of
# the vector is a thousand times as large.
_ROUNDING = 1e-6


class _Weight(NamedTuple):
    """A parameter or buffer W, and the layer that computes with W + B A in its place, if there is one."""

    own: Tensor
    edit: lora.Linear | None = None

    @property
    def whole(self) -> Tensor:
        return self.own if self.edit is None else self.own + self.edit.get_delta_weight(ADAPTER).to(self.own)


def have_same_weights(one: LoadedModel, other: LoadedModel) -> bool:
    """Whether all parameters and buffers of two models of one class are equal but for the rounding of float32.

    False too where nobody can tell: of weights that lie on a disk, and of adapters that are more than a B A beside W.
    """
    if type(one.layout.model) is not type(other.layout.model):
        return False
    own, others = _weights(one), _weights(other)
    return bool(own) and own.keys() == others.keys() and all(_near(own[name], others[name]) for name in own)


def _near(one: _Weight, other: _Weight) -> bool:
    unedited = one.edit is None and other.edit is None
    if one.own.shape != other.own.shape or one.own.dtype != other.own.dtype:
        return False
    if unedited and one.own.data_ptr() == other.own.data_ptr() and one.own.stride() == other.own.stride():
        return True  # `reload.share_equal` has compared them
    ours, theirs = one.whole, other.whole
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    typical = float(theirs.double().square().mean().sqrt()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=_ROUNDING, atol=_ROUNDING * typical)  # NaN is near nothing


def _weights(loaded: LoadedModel) -> dict[str, _Weight]:
    """By their names in the model without an adapter; empty where one cannot be read here."""
    weights, inner = dict[str, _Weight](), set[int]()
    for name, module in loaded.layout.model.named_modules():
        if id(module) in inner:
            continue
        edit, owner = None, module
        if type(module).__module__.partition(".")[0] == "peft":
            if not _adds_product(module):
                return {}
            edit, owner = module, module.get_base_layer()
            inner.update(map(id, module.modules()))
        for kind, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            weights[f"{name}.{kind}"] = _Weight(value, edit if kind == "weight" else None)
    return {} if any(weight.own.is_meta for weight in weights.values()) else weights


def _adds_product(module: torch.nn.Module) -> bool:
    """Whether an adapted layer computes with W + B A and nothing else."""
    if type(module) is not lora.Linear:
        return False
    layer: Any = module
    more = layer.use_dora.get(ADAPTER) or layer.lora_bias.get(ADAPTER) or ADAPTER in layer.lora_variant
    return not (more or layer.merged or layer.disable_adapters) and layer.active_adapters == [ADAPTER]
