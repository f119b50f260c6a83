"""Where the blocks, points, output projections and biases of a loaded model are.

An *output projection* is a Linear (or GPT-2's Conv1D) whose output goes into the residual stream: the attention's
o_proj and the MLP's down_proj. In a post-norm model (Gemma 2 and 3, OLMo 2) a norm stands between it and the stream,
so the point `mlp_out` is the norm's output, and a bias of the projection is not a shift of the stream. All of it is
measured on the model (`measure`), not declared by its family.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import LayoutError
from compile_steer.steering.blocks import input_device
from compile_steer.steering.measure import KINDS, Measured, ProjectionKind, Sublayer, measure
from compile_steer.steering.program import Program
from compile_steer.steering.sites import Point, Site

EXPERTS = "a mixture of experts: no one matrix writes what it adds to the stream"
NATIVE = "native"  # the bias flag of a projection that has a bias already

# By model, and by what decides the layout, so that copies of a model (an adapter's base) are not measured again.
_BY_MODEL: WeakKeyDictionary[nn.Module, Measured] = WeakKeyDictionary()
_BY_CONFIG: dict[tuple[type, str], Measured] = {}
_FLAGS: dict[tuple[type, str], dict[ProjectionKind, str]] = {}


@dataclass(frozen=True)
class OutputProjection:
    """One output projection; `name` is the module's full name in the causal language model."""

    layer: int
    kind: ProjectionKind
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Layout:
    """A loaded model and what was measured on it.

    Attributes:
        flags: the config flags that give the projections of a kind a bias, where they are known beforehand (of the
            architecture that a model is to be converted to); None: they are tried.
    """

    model: PreTrainedModel
    measured: Measured
    flags: Mapping[ProjectionKind, str] | None = None

    @staticmethod
    def of(model: nn.Module) -> Layout:
        """Return the layout of a causal language model, also when PEFT has wrapped it.

        Raises:
            LayoutError: the model is no decoder of residual blocks (see `measure`).
        """
        # PEFT's own names ("base_model.model. ...") are never used: a patch names modules as stock code does.
        unwrap = getattr(model, "get_base_model", None)
        inner: PreTrainedModel = model if unwrap is None else unwrap()
        measured = _BY_MODEL.get(inner)
        if measured is None:
            key = _key(inner)
            if key not in _BY_CONFIG:
                _BY_CONFIG[key] = measure(inner)
            measured = _BY_MODEL[inner] = _BY_CONFIG[key]
        return Layout(inner, measured)

    @staticmethod
    def share(base: PreTrainedModel, edited: PreTrainedModel) -> None:
        """Give a model the layout of the base that it was made from, where both run the same code."""
        # Not measured again: an edit moves no module, and one that has overflowed is for the verifier to name.
        if type(base) is type(edited):
            _BY_MODEL[edited] = Layout.of(base).measured

    @property
    def device(self) -> torch.device:
        """Where the model takes its input: weights that lie on several devices, or on disk, have a first one."""
        return input_device(self.model)

    def device_of(self, layer: int) -> torch.device:
        """Where the block `layer` computes."""
        return input_device(self.blocks[layer], self.device)

    @property
    def backbone(self) -> nn.Module:
        """The model without its language-model head."""
        return cast(nn.Module, self.model.get_submodule(self.measured.backbone))

    def block_output(self, hidden: Tensor) -> Any:
        """`hidden` in the form in which a block returns its output."""
        count = self.measured.outputs
        return (hidden, *[None] * (count - 1)) if count else hidden

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return list(cast(nn.ModuleList, self.model.get_submodule(self.measured.blocks)))

    @property
    def n_layers(self) -> int:
        return len(self.measured.sublayers)

    @property
    def d_model(self) -> int:
        return self.measured.d_model

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The full names of the modules that make the input of block 0."""
        return self.measured.embeddings

    @property
    def tied(self) -> bool:
        """True where the language-model head is the token embedding itself."""
        # The tensors themselves are compared, which is right whatever the config says.
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    def sublayer(self, layer: int, kind: ProjectionKind) -> Sublayer:
        """What writes the stream in that sublayer of a block; raises `LayoutError` where nothing was found."""
        self._require_block(layer)
        sublayer = self.measured.sublayers[layer].get(kind)
        if sublayer is None:
            name = "moves information between tokens" if kind == "attn" else "reads each token alone"
            raise LayoutError(
                f"block {layer} of this {self.model.config.model_type} has no {kind}_out: no one module that {name} adds "
                "to the stream by a constant factor. Use the point resid_post."
            )
        return sublayer

    def projection_kinds(self, layer: int) -> tuple[ProjectionKind, ...]:
        """The sublayers of a block that a matrix writes: a mixture of experts has none but a shared expert's."""
        sublayers = self.measured.sublayers[layer]
        return tuple(kind for kind in KINDS if kind in sublayers and sublayers[kind].projection is not None)

    def no_projection(self, layer: int, kind: ProjectionKind) -> str:
        """Why no output projection of that kind is in the block."""
        sublayer = self.measured.sublayers[layer].get(kind)
        if sublayer is None:
            return f"block {layer} has no {kind}_out that one module writes"
        name = f"the {'attention' if kind == 'attn' else 'MLP'} of {self.model.config.model_type}"
        if kind == "attn" and not sublayer.reason:
            return f"no one matrix writes what {name} adds to the stream"
        return f"{name} is {sublayer.reason or EXPERTS}"

    def output_projection(self, layer: int, kind: ProjectionKind) -> OutputProjection:
        """The attention's or the MLP's projection of a block; raises `LayoutError` for a mixture of experts."""
        projection = self.sublayer(layer, kind).projection
        if projection is None:
            raise LayoutError(f"{self.no_projection(layer, kind)}.")
        name = f"{self.measured.blocks}.{layer}.{projection}"
        return OutputProjection(layer, kind, name, self.model.get_submodule(name))

    @property
    def output_projections(self) -> dict[str, OutputProjection]:
        """Every output projection of the model by its module's name, in the order of the blocks."""
        projections = [
            self.output_projection(layer, kind)
            for layer in range(self.n_layers)
            for kind in self.projection_kinds(layer)
        ]
        return {projection.name: projection for projection in projections}

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Every Linear (or Conv1D) of a block, by its full name in the causal language model."""
        prefix = f"{self.measured.blocks}.{layer}"
        modules = self.blocks[layer].named_modules()
        return {f"{prefix}.{name}": module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}

    def hook_module(self, site: Site) -> nn.Module:
        """The module whose output is the activation at `site`; for `resid_pre` 0 the block whose input it is.

        Raises `LayoutError` if the model lacks that block or point.
        """
        self._require_block(site.layer)
        if site.point in ("resid_pre", "resid_post"):
            # `resid_pre` k > 0 is hooked as the output of block k-1: what reads that output must see the edit too.
            return self.blocks[site.changes_from]
        kind: ProjectionKind = "attn" if site.point == "attn_out" else "mlp"
        return self.blocks[site.layer].get_submodule(self.sublayer(site.layer, kind).point)

    def _require_block(self, layer: int) -> None:
        if layer >= self.n_layers:
            raise LayoutError(
                f"layer {layer} does not exist in this model; it has blocks 0 to {self.n_layers - 1} (0-based)."
            )

    def require_program(self, program: Program, model: str, revision: str) -> None:
        """Raise `ArtifactError` unless `program` was made for this very model."""
        program.require(model, revision, self.d_model, self.n_layers)

    def norm(self, layer: int, kind: ProjectionKind) -> nn.Module | None:
        """The norm between that projection and the stream, or None."""
        name = self.sublayer(layer, kind).norm
        return None if name is None else self.blocks[layer].get_submodule(name)

    def expert_bias(self, layer: int) -> str | None:
        """The full name of the parameter that shifts what a mixture of experts writes, or None."""
        mlp = self.measured.sublayers[layer].get("mlp")
        relative = None if mlp is None else mlp.expert_bias
        return None if relative is None else f"{self.measured.blocks}.{layer}.{relative}"

    def bias_flag(self, layer: int, kind: ProjectionKind) -> str | None:
        """'native', the config flag that gives that projection a bias, or None."""
        if kind not in self.projection_kinds(layer):
            return None
        projection = self.output_projection(layer, kind)
        if projection.module.bias is not None:
            return NATIVE
        flags = _bias_flags(self) if self.flags is None else self.flags
        return flags.get(kind)

    def stream_scale(self, layer: int, point: Point) -> float:
        """What the model multiplies an activation at `point` by before it is added to the residual stream."""
        if point in ("resid_pre", "resid_post"):
            return 1.0
        return self.sublayer(layer, "attn" if point == "attn_out" else "mlp").multiplier


def _key(model: PreTrainedModel) -> tuple[type, str]:
    """What decides the layout: the class, the config but for the width of the numbers, and scales among the weights."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in ("dtype", "torch_dtype")}
    scales = {
        name: float(value) for name, value in model.state_dict().items() if value.numel() == 1 and not value.is_meta
    }
    return type(model), json.dumps([settings, scales], sort_keys=True, default=str)


def _bias_flags(layout: Layout) -> dict[ProjectionKind, str]:
    """The config flags that make stock code build a bias on the output projections, tried without memory."""
    config = layout.model.config
    key = _key(layout.model)
    if key not in _FLAGS:
        flags: dict[ProjectionKind, str] = {}
        names = {p.kind: p.name for p in reversed(list(layout.output_projections.values()))}
        before = {name for name, _ in layout.model.named_parameters()}
        for flag in (name for name, value in config.to_dict().items() if "bias" in name and value is False):
            changed = copy.deepcopy(config)
            setattr(changed, flag, True)
            with torch.device("meta"):
                added = {name for name, _ in type(layout.model)(changed).named_parameters()} - before
            # New biases start at zero; any other new weight would change what the model computes.
            if all(name.endswith("bias") for name in added):
                flags = {kind: flag for kind, name in names.items() if f"{name}.bias" in added} | flags
        _FLAGS[key] = flags
    return _FLAGS[key]
