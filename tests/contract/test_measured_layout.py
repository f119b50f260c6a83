"""The layout is measured: kinds of blocks that no table names, and models that have no stream to steer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compile_steer.common.errors import LayoutError
from compile_steer.lowering.exact import orthogonalise, orthogonalise_refusal
from compile_steer.steering.hooks import steered
from compile_steer.steering.layout import Layout
from compile_steer.steering.measure import Sublayer, measure
from compile_steer.steering.patch import with_patch
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import Point, Site

_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
_HYBRID = {
    **_SIZES, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_EXPERTS = {**_SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def build(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains as trained models have them; matrices so large that what stands behind them answers.
            parameter.copy_(
                torch.exp(torch.randn_like(parameter)) if "norm" in name else torch.randn_like(parameter) / 5
            )
    return model


# In each: the first block's points, and the last one's where it is of another kind.
KINDS = {
    "parallel": ("gptj", _GPT, {"attn": "attn.out_proj", "mlp": "mlp.fc_out"}, {}),
    "tuples, added in place": (
        "falcon", {**_SIZES, "ffn_hidden_size": 48}, {"attn": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}, {},
    ),
    "all tokens in one row": (
        "opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, {"attn": "self_attn.out_proj", "mlp": "fc2"}, {},
    ),
    "hybrid": (
        "qwen3_5_text", _HYBRID, {"attn": "linear_attn.out_proj", "mlp": "mlp.down_proj"}, {"attn": "self_attn.o_proj"},
    ),
    "state space alone": (
        "mamba", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, {"attn": "mixer.out_proj"}, {},
    ),
    "experts": ("mixtral", _EXPERTS, {"attn": "self_attn.o_proj", "mlp": "mlp"}, {}),
    "norms behind": (
        "olmo3", {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
        {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}, {},
    ),
    "inputs by block behind the MLP": (
        "gemma4_text",
        {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2},
        {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_block_shows_what_writes_its_stream(kind: str) -> None:
    family, settings, first, last = KINDS[kind]
    layout = measure(build(family, settings))
    points = [{name: sublayer.point for name, sublayer in block.items()} for block in layout.sublayers]
    assert points == [first, {**first, **last}]
    assert layout.d_model == 32
    assert all(sublayer.multiplier == 1.0 for block in layout.sublayers for sublayer in block.values())


def test_a_norm_behind_a_projection_and_a_mixture_without_one_are_told() -> None:
    attn, mlp = (measure(build("olmo3", KINDS["norms behind"][1])).sublayers[0][kind] for kind in ("attn", "mlp"))
    assert (attn.projection, attn.norm) == ("self_attn.o_proj", "post_attention_layernorm")
    assert (mlp.projection, mlp.norm) == ("mlp.down_proj", "post_feedforward_layernorm")
    assert measure(build("mixtral", _EXPERTS)).sublayers[0]["mlp"] == Sublayer("mlp")


def test_scales_among_the_weights_are_measured_and_a_sublayer_that_is_read_within_its_block_is_told() -> None:
    model = build(*KINDS["inputs by block behind the MLP"][:2])
    assert not Layout.of(model).measured.sublayers[1]["mlp"].last
    assert measure(build("llama", {**_SIZES, "num_key_value_heads": 2})).sublayers[1]["mlp"].last
    other = build(*KINDS["inputs by block behind the MLP"][:2])
    other.get_buffer("model.layers.1.layer_scalar").fill_(0.5)  # which no config says
    assert [round(block["mlp"].multiplier, 5) for block in Layout.of(other).measured.sublayers] == [1.0, 0.5]


def test_a_shared_expert_is_a_projection_that_does_not_write_alone() -> None:
    settings = {**_SIZES, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}  # fmt: skip
    dense, mixture = (block["mlp"] for block in measure(build("glm4_moe", settings)).sublayers)
    assert (dense.point, dense.projection, dense.alone) == ("mlp.down_proj", "mlp.down_proj", True)
    assert (mixture.point, mixture.projection, mixture.alone) == ("mlp", "mlp.shared_experts.down_proj", False)


def test_a_model_in_another_width_of_numbers_has_the_same_layout() -> None:
    model = build("llama", {**_SIZES, "num_key_value_heads": 2})
    assert measure(model) == measure(model.to(torch.bfloat16))


def test_a_model_that_reads_later_tokens_is_refused() -> None:
    with pytest.raises(LayoutError, match="BertLMHeadModel reads later tokens"):
        measure(build("bert", _SIZES))


def test_a_model_that_computes_nan_is_refused_with_that_reason() -> None:
    model = build("llama", {**_SIZES, "num_key_value_heads": 2})
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").fill_(3e38)
    with pytest.raises(LayoutError, match="LlamaForCausalLM in float32 computes NaN or infinity on 8 tokens"):
        measure(model)


def test_measuring_leaves_no_hook_and_no_changed_weight() -> None:
    model = build("gpt_oss", {**_EXPERTS, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layout = measure(model)
    assert layout.sublayers[1]["mlp"].expert_bias == "mlp.experts.down_proj_bias"
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


_OPT = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}


@pytest.mark.parametrize("point", ["mlp_out", "resid_post"])
def test_positions_are_followed_where_the_decoder_is_run_past_its_backbone(point: Point) -> None:
    model = build("opt", _OPT)
    ids = torch.arange(10, 18).view(2, 4)
    last = Program((Intervention(Site(1, point), "add", torch.eye(32)[3], positions="last_prompt"),), "", "")
    base = model(input_ids=ids).logits
    with steered(model, last):
        changed = model(input_ids=ids).logits
    assert torch.equal(changed[:, :-1], base[:, :-1])
    assert not torch.allclose(changed[:, -1], base[:, -1])


def test_an_ablation_everywhere_is_exact_only_where_embeddings_alone_enter_block_0() -> None:
    settings = {"vocab_size": 97, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}
    everywhere = Program(ablate_everywhere(torch.eye(32)[0], 2), "", "")
    sines, learned = Layout.of(build("xglm", settings)), Layout.of(build("opt", _OPT))
    assert (sines.embeddings, len(learned.embeddings)) == ((), 2)
    assert "not a sum of embeddings alone" in (orthogonalise_refusal(everywhere, sines) or "")
    ids = torch.arange(10, 18).view(2, 4)
    with steered(learned.model, everywhere):
        hooks = learned.model(input_ids=ids).logits
    with with_patch(learned.model, orthogonalise(everywhere, learned)):
        assert torch.allclose(learned.model(input_ids=ids).logits, hooks, atol=1e-4)


def test_blocks_that_return_lists_are_measured_and_steered() -> None:
    model = build("openai-gpt", _GPT)
    program = Program((Intervention(Site(0, "resid_post"), "add", torch.randn(32)),), "", "")
    ids = torch.arange(10, 18).view(2, 4)
    with steered(model, program):
        assert not torch.allclose(model(input_ids=ids).logits, build("openai-gpt", _GPT)(input_ids=ids).logits)


def test_a_matrix_that_is_written_with_another_factor_than_its_point_is_no_projection() -> None:
    settings = {**_SIZES, "num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}  # fmt: skip
    model = build("glm4_moe", settings)
    shared: Any = model.get_submodule("model.layers.1.mlp.shared_experts")
    shared.register_forward_hook(lambda _module, _args, output: output / 2)
    mixture = measure(model).sublayers[1]["mlp"]
    assert (mixture.point, mixture.multiplier, mixture.projection) == ("mlp", 1.0, None)
