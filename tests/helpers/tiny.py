"""Tiny random models of every family, built from configs, with nothing left at a neutral value.

Norm weights differ from 1, biases from 0, writers are not square where the family allows it, and the
embeddings share a common part, as those of trained models do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import POINTS, OperationName, Point, Site

VOCAB, HIDDEN, FFN, LAYERS = 97, 32, 48, 4
PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)

_SPECIAL: dict[str, Any] = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
_COMMON: dict[str, Any] = {
    **_SPECIAL,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 12}
_SLIDING: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "query_pre_attn_scalar": 9,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {**_COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "gpt2": {
        **_SPECIAL,
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_inner": FFN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": _COMMON,
    "gemma2": {**_GROUPED, **_SLIDING},
    "gemma3_text": {**_GROUPED, **_SLIDING},
    "granite": {
        **_COMMON,
        "num_key_value_heads": 2,
        "residual_multiplier": 0.37,
        "embedding_multiplier": 1.7,
        "attention_multiplier": 0.21,
        "logits_scaling": 1.3,
    },
    "olmo2": {**_COMMON, "num_key_value_heads": 2},
    "smollm3": {**_COMMON, "num_key_value_heads": 2},
    "gpt_oss": {
        **_GROUPED,
        "intermediate_size": 24,
        "num_local_experts": 5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    },
    "qwen3_moe": {
        **_GROUPED,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "phi": {**_COMMON, "num_key_value_heads": 2},
    "phi3": {**_COMMON, "num_key_value_heads": 2, "original_max_position_embeddings": 64},
}
FAMILIES = tuple(sorted(CONFIGS))
LAYER = 2  # neither the first nor the last
ALL_SITES = [(family, point) for family in FAMILIES for point in POINTS]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: 'w7' is token 7; anything else is unknown."""
    words = {"<pad>": PAD_ID, "<s>": BOS_ID, "</s>": EOS_ID, "<unk>": UNK_ID, "user": 4, "assistant": 5}
    words |= {f"w{n}": n for n in range(6, VOCAB)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    found.chat_template = CHAT_TEMPLATE
    return found


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A fresh random model of a family in fp32, frozen and in evaluation mode."""
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name in ("bias", "sinks"):  # some are drawn when the model is made, from no seed of ours
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
                elif parameter.ndim == 1:  # norm weights about 1 (Gemma's about 0) and biases about 0
                    parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
                elif isinstance(module, nn.Embedding):
                    shared = torch.randn(parameter.shape[1], generator=generator)
                    parameter.copy_(0.4 * shared + 0.6 * normal(parameter))
                elif name.endswith("_bias"):  # of experts, [n_experts, d_out]
                    parameter.copy_(normal(parameter) / 4)
                elif parameter.ndim == 3:  # experts, [n_experts, d_out, d_in]
                    parameter.copy_(normal(parameter) / parameter.shape[2] ** 0.5)
                else:
                    assert name == "weight", f"unforeseen parameter {name} of {type(module).__name__}"
                    d_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
                    parameter.copy_(normal(parameter) / d_in**0.5)


def revision(family: str) -> str:
    """The revision of the shared tiny model of a family."""
    return f"sha256:tiny-{family}"


@cache
def loaded(family: str, seed: int = 0) -> LoadedModel:
    """A shared tiny model with its tokenizer, not on disk; tests leave it as they found it."""
    return LoadedModel(build(family, seed), tokenizer(), f"tiny-{family}", revision(family), "")


def saved(family: str, folder: Path) -> LoadedModel:
    """The shared tiny model with its weights and tokenizer saved to `folder`, from where it can be loaded again."""
    one = loaded(family)
    one.model.save_pretrained(folder)
    one.tokenizer.save_pretrained(folder)
    return LoadedModel(one.model, one.tokenizer, one.id, one.revision, str(folder))


# --------------------------------------------------------------------------------------------- texts


def texts(shapes: Sequence[tuple[int, int]] = ((5, 4), (3, 7), (4, 2)), seed: int = 0) -> list[Encoded]:
    """Random conversations of (prompt tokens, response tokens); no special tokens in them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Encoded(tuple(torch.randint(6, VOCAB, (prompt + response,), generator=generator).tolist()), prompt)
        for prompt, response in shapes
    ]


@dataclass(frozen=True)
class Padded:
    """A batch padded on either side; all tensors are [batch, time]."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    roles: Tensor

    @staticmethod
    def of(rows: Sequence[Encoded], side: str) -> Padded:
        time = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), time), PAD_ID)
        roles = torch.full((len(rows), time), PAD, dtype=torch.int8)
        for at, row in enumerate(rows):
            start = time - len(row.ids) if side == "left" else 0
            ids[at, start : start + len(row.ids)] = torch.tensor(row.ids)
            kinds = [PROMPT] * (row.n_prompt - 1) + [LAST_PROMPT] + [RESPONSE] * (len(row.ids) - row.n_prompt)
            roles[at, start : start + len(row.ids)] = torch.tensor(kinds, dtype=torch.int8)
        mask = (roles != PAD).long()
        return Padded(ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0), roles)

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
        }

    def rows(self, values: Tensor) -> list[Tensor]:
        """Split [batch, time, ...] into the rows' real tokens."""
        assert values.shape[:2] == self.input_ids.shape
        return [row[mask.bool()] for row, mask in zip(values, self.attention_mask, strict=True)]


def logits(model: nn.Module, batch: Padded) -> Tensor:
    """Logits of the real tokens of all rows, [n_tokens, vocab]."""
    with torch.no_grad():
        return torch.cat(batch.rows(model(**batch.inputs).logits))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest deviation over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


# ------------------------------------------------------------------------------------------- programs


def vector(seed: int, norm: float = 2.5, width: int = HIDDEN) -> Tensor:
    """A random vector of the given length."""
    random = torch.randn(width, generator=torch.Generator().manual_seed(1000 + seed))
    found: Tensor = norm * random / random.norm()
    return found


def intervention(
    operation: OperationName = "add",
    point: Point = "resid_post",
    layer: int = 1,
    *,
    positions: str = "all",
    coefficient: float = 1.7,
    seed: int = 0,
) -> Intervention:
    """An intervention whose numbers are all unlike 0 and 1."""
    return Intervention(
        Site(layer, point),
        operation,
        vector(seed, 2.5 if operation == "add" else 1.0),
        coefficient if operation == "add" else 0.6 * coefficient,
        positions,
        projection=-1.9 if operation == "clamp" else None,
    )


def program(family: str, *interventions: Intervention) -> Program:
    """A program for the tiny model of a family."""
    return Program(interventions, f"tiny-{family}", revision(family))


def edit(one: Intervention, activation: Tensor) -> Tensor:
    """What an intervention means, written out from its definition in words; [..., d_model]."""
    v, c = one.vector, one.coefficient
    if one.operation == "add":
        return activation + c * v
    target = 0.0 if one.projection is None else one.projection
    return activation + c * (target - (activation * v).sum(dim=-1, keepdim=True)) * v


# -------------------------------------------------------------------------------------------- patches


def random_patch(one: LoadedModel, *, ranks: Sequence[int] = (2, 3), scale: float = 0.3, seed: int = 0) -> WeightPatch:
    """Low-rank edits of alternating ranks for every Linear of blocks 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    edits: dict[str, LowRank] = {}
    for name, module in one.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (".1." in name or ".2." in name):
            d_out, d_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            rank = ranks[len(edits) % len(ranks)]
            B = torch.randn(d_out, rank, generator=generator)
            A = torch.randn(rank, d_in, generator=generator)
            edits[name] = LowRank(scale * B, A / d_in**0.5)
    return WeightPatch(edits)
