"""What a model family is: where its blocks, points, output projections and biases are.

An *output projection* is a Linear (or GPT-2's Conv1D) whose output goes into the residual stream: the attention's
o_proj and the MLP's down_proj. In a post-norm family (Gemma 2 and 3, OLMo 2) a norm stands between it and the stream,
so the point `mlp_out` is the norm's output, and a bias of the projection is not a shift of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import LayoutError
from compile_steer.steering.program import Program
from compile_steer.steering.sites import Point, Site

ProjectionKind = Literal["attn", "mlp"]
EXPERTS = "a mixture of experts: no one matrix writes what it adds to the stream"


@dataclass(frozen=True)
class Family:
    """Where stock code of a family has what, by default where Llama's has it.

    Names are relative to a block unless it says otherwise.

    Attributes:
        blocks: the list of blocks, by its full name.
        attn, mlp: the output projections; of a mixture of experts `mlp` is the whole mixture.
        attn_bias, mlp_bias: how the projection comes to have a bias: 'native' (the module has one already), the name
            of a config flag that adds it, or None (stock code has no place for it).
        attn_norm, mlp_norm: the norm between projection and stream, in a post-norm family.
        embeddings: the modules that make the input of block 0, by their full names.
        experts: the MLP is a mixture of experts, of which no one matrix writes the stream.
        expert_bias: the parameter [n_experts, d_model] that each expert adds, where the router's weights sum to 1, so
            that the same row for every expert is a shift of the stream.
    """

    blocks: str = "model.layers"
    attn: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    attn_bias: str | None = None
    mlp_bias: str | None = None
    attn_norm: str | None = None
    mlp_norm: str | None = None
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    experts: bool = False
    expert_bias: str | None = None


_POST_NORMS = Family(attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
_BOTH_FLAGS = Family(attn_bias="attention_bias", mlp_bias="mlp_bias")

# Read off each family's stock modelling code; tests/contract builds every one and compares with hooks.
FAMILIES: dict[str, Family] = {
    "llama": _BOTH_FLAGS,
    "smollm3": _BOTH_FLAGS,
    "granite": _BOTH_FLAGS,
    "qwen3": Family(attn_bias="attention_bias"),
    "qwen3_moe": Family(mlp="mlp", attn_bias="attention_bias", experts=True),
    "gpt_oss": Family(mlp="mlp", attn_bias="attention_bias", experts=True, expert_bias="mlp.experts.down_proj_bias"),
    # Qwen2's biases are on query, key and value alone; Mistral and Phi-3 have none.
    "qwen2": Family(),
    "mistral": Family(),
    "phi3": Family(),
    "gemma2": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "olmo2": _POST_NORMS,
    "gpt2": Family(
        "transformer.h",
        "attn.c_proj",
        "mlp.c_proj",
        "native",
        "native",
        embeddings=("transformer.wte", "transformer.wpe"),
    ),
    "gpt_neox": Family(
        "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "native", "native", embeddings=("gpt_neox.embed_in",)
    ),
    "phi": Family("model.layers", "self_attn.dense", "mlp.fc2", "native", "native"),
}


@dataclass(frozen=True)
class OutputProjection:
    """One output projection; `name` is the module's full name in the causal language model."""

    layer: int
    kind: ProjectionKind
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Layout:
    """A loaded model seen through its family."""

    model: PreTrainedModel
    family: Family

    @staticmethod
    def of(model: nn.Module) -> Layout:
        """Return the layout of a causal language model, also when PEFT has wrapped it; raises `LayoutError`."""
        # PEFT's own names ("base_model.model. ...") are never used: a patch names modules as stock code does.
        unwrap = getattr(model, "get_base_model", None)
        inner: PreTrainedModel = model if unwrap is None else unwrap()
        family = FAMILIES.get(inner.config.model_type)
        if family is None:
            raise LayoutError(
                f"model family '{inner.config.model_type}' ({type(inner).__name__}) is not known. "
                f"Known: {', '.join(sorted(FAMILIES))}. Add a Family to compile_steer/steering/layout.py and to the contract tests."
            )
        return Layout(inner, family)

    @property
    def backbone(self) -> nn.Module:
        """The model without its language-model head."""
        return cast(nn.Module, self.model.base_model)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        return list(cast(nn.ModuleList, self.model.get_submodule(self.family.blocks)))

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def post_norm(self) -> bool:
        """True where a norm stands between the output projections and the residual stream."""
        return self.family.mlp_norm is not None

    @property
    def tied(self) -> bool:
        """True where the language-model head is the token embedding itself."""
        # The tensors themselves are compared, which is right whatever the config says.
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @property
    def residual_multiplier(self) -> float:
        """What the family multiplies a sublayer's output by before adding it (Granite); 1 for the others."""
        return float(getattr(self.model.config, "residual_multiplier", 1.0))

    @property
    def projection_kinds(self) -> tuple[ProjectionKind, ...]:
        """The sublayers whose output one matrix writes: a mixture of experts has none."""
        return ("attn",) if self.family.experts else ("attn", "mlp")

    def output_projection(self, layer: int, kind: ProjectionKind) -> OutputProjection:
        """The attention's or the MLP's projection of a block; raises `LayoutError` for a mixture of experts."""
        if kind not in self.projection_kinds:
            raise LayoutError(f"the MLP of {self.model.config.model_type} is {EXPERTS}.")
        relative = self.family.attn if kind == "attn" else self.family.mlp
        name = f"{self.family.blocks}.{layer}.{relative}"
        return OutputProjection(layer, kind, name, self.model.get_submodule(name))

    @property
    def output_projections(self) -> dict[str, OutputProjection]:
        """Every output projection of the model by its module's name, in the order of the blocks."""
        kinds = self.projection_kinds
        projections = [self.output_projection(layer, kind) for layer in range(self.n_layers) for kind in kinds]
        return {projection.name: projection for projection in projections}

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Every Linear (or Conv1D) of a block, by its full name in the causal language model."""
        prefix = f"{self.family.blocks}.{layer}"
        modules = self.blocks[layer].named_modules()
        return {f"{prefix}.{name}": module for name, module in modules if isinstance(module, nn.Linear | Conv1D)}

    def hook_module(self, site: Site) -> nn.Module:
        """The module whose output is the activation at `site`; for `resid_pre` 0 the block whose input it is.

        Raises `LayoutError` if the model lacks that block.
        """
        if site.layer >= self.n_layers:
            raise LayoutError(
                f"layer {site.layer} does not exist in this model; it has blocks 0 to {self.n_layers - 1} (0-based)."
            )
        if site.point in ("resid_pre", "resid_post"):
            # `resid_pre` k > 0 is hooked as the output of block k-1: what reads that output must see the edit too.
            return self.blocks[site.changes_from]
        family, block = self.family, self.blocks[site.layer]
        if site.point == "attn_out":
            return block.get_submodule(family.attn_norm or family.attn)
        return block.get_submodule(family.mlp_norm or family.mlp)

    def require_program(self, program: Program, model: str, revision: str) -> None:
        """Raise `ArtifactError` unless `program` was made for this very model."""
        program.require(model, revision, self.d_model, self.n_layers)

    def expert_bias(self, layer: int) -> str | None:
        """The full name of the parameter that shifts what a mixture of experts writes, or None."""
        relative = self.family.expert_bias
        return None if relative is None else f"{self.family.blocks}.{layer}.{relative}"

    def bias_flag(self, kind: ProjectionKind) -> str | None:
        """'native', the config flag that gives that projection a bias, or None."""
        return self.family.attn_bias if kind == "attn" else self.family.mlp_bias

    def stream_scale(self, point: Point) -> float:
        """What the family multiplies an activation at `point` by before it is added to the residual stream."""
        return self.residual_multiplier if point in ("attn_out", "mlp_out") else 1.0
