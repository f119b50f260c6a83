"""Any adapter as plain LoRA, which stock PEFT computes to the same logits; or every reason why that is impossible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.formats.lora import read_lora
from compile_steer.tools.serving.export import export
from tests.helpers.tiny import Padded, build, logits, relative_error, texts

TARGETS = ["q_proj", "o_proj", "down_proj"]
DOWN = "model.layers.2.mlp.down_proj"


def adapter(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A PEFT folder with random factors, as stock PEFT saves it."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "init_lora_weights": False, **settings})
    torch.manual_seed(5)
    wrapped: Any = get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    wrapped.save_pretrained(folder)
    return folder


def under_peft(folder: Path, family: str = "llama") -> Tensor:
    """Logits of the adapter at `folder` on the tiny model, by stock PEFT."""
    wrapped: Any = PeftModel.from_pretrained(build(family), str(folder))
    return logits(wrapped.eval(), Padded.of(texts(), "right"))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"down_proj": 11, "layers.1.self_attn.o_proj": 2}},
    "ranks": {"rank_pattern": {"o_proj": 2, r"model.layers.[12].mlp.down_proj": 5}},
    "all at once": {
        "use_rslora": True,
        "alpha_pattern": {"^model.layers.2.mlp.down_proj": 11},
        "rank_pattern": {"down_proj": 5},
        "target_modules": r".*\.(o_proj|down_proj|lm_head)",
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_plain_lora_equals_the_adapter_under_peft(tmp_path: Path, kind: str, engine: Any) -> None:
    folder = adapter(tmp_path / "theirs", **KINDS[kind])
    exported = export(folder, engine, tmp_path / "ours")
    base = logits(build("llama"), Padded.of(texts(), "right"))
    expected = under_peft(folder)
    assert relative_error(base, expected) > 0.05, "an adapter without effect could not be lost"
    assert relative_error(under_peft(tmp_path / "ours"), expected) < 1e-5
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == config["r"] == 8
    assert not (config["use_rslora"] or config["alpha_pattern"] or config["rank_pattern"])
    assert {key for note in exported.notes for key in KINDS[kind] if key in note} == KINDS[kind].keys() - {
        "target_modules"
    }


def test_a_transposed_family_is_kept(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", "gpt2", target_modules=["c_proj"], fan_in_fan_out=True, use_rslora=True)
    export(folder, "transformers", tmp_path / "ours")
    assert relative_error(under_peft(tmp_path / "ours", "gpt2"), under_peft(folder, "gpt2")) < 1e-5


def test_a_wrong_scale_would_show(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", **KINDS["rslora"])
    expected = under_peft(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "use_rslora": False}), encoding="utf-8")
    assert relative_error(under_peft(folder), expected) > 1e-2


RICH: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora is True: DoRA scales every row"),
    "biases": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: whole modules are replaced"),
    "tokens": ({"trainable_token_indices": [4, 9]}, "trainable_token_indices is .*: rows of the embeddings"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa: its base is not the model"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is olora: its base is not the model"),
    "aLoRA": ({"alora_invocation_tokens": [7, 8]}, "alora_invocation_tokens is .*: the adapter is on only behind"),
}


@pytest.mark.parametrize("kind", RICH)
def test_more_than_plain_lora_is_refused(tmp_path: Path, kind: str) -> None:
    settings, reason = RICH[kind]
    folder = adapter(tmp_path / "theirs", **settings)
    with pytest.raises(ArtifactError, match=f"{reason}.*merge_and_unload"):
        export(folder, "vllm", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_every_reason_is_reported_at_once(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs")
    path = folder / "adapter_config.json"
    settings = {
        "lora_bias": True,
        "layer_replication": [[0, 2]],
        "init_lora_weights": "pissa_niter_4",
        "woven": {"into": 3},
    }
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **settings}), encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        read_lora(folder)
    message = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert all(key in message for key in settings)
    assert "woven is {'into': 3}, a setting that is not supported" in message


@pytest.mark.parametrize(
    "spoil", ["half", "bias", "rank", "nan", "integers", "shape", "empty", "pickle", "config", "another kind"]
)
def test_damage_is_named(tmp_path: Path, spoil: str) -> None:
    folder = adapter(tmp_path / "theirs")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, name = load_file(weights), f"base_model.model.{DOWN}"
    if spoil == "half":
        del tensors[f"{name}.lora_B.weight"]
    elif spoil == "bias":
        tensors[f"{name}.bias"] = torch.ones(3)
    elif spoil == "rank":
        config.write_text(config.read_text(encoding="utf-8").replace('"r": 3', '"r": 4'), encoding="utf-8")
    elif spoil in ("nan", "integers"):
        A = tensors[f"{name}.lora_A.weight"]
        tensors[f"{name}.lora_A.weight"] = {"nan": A * float("nan"), "integers": A.to(torch.int8)}[spoil]
    elif spoil == "shape":
        tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:2].clone()
    elif spoil == "empty":
        tensors = {}
    elif spoil == "config":
        config.write_text("{", encoding="utf-8")
    elif spoil == "another kind":
        config.write_text(json.dumps({"peft_type": "LOHA", "r": 3}), encoding="utf-8")
    save_file(tensors, weights)
    if spoil == "pickle":
        weights.rename(folder / "adapter_model.bin")
    messages = {
        "half": rf"{DOWN}\.lora_B\.weight is missing",
        "bias": rf"{DOWN}\.bias is not one of a pair",
        "rank": "the factors have rank 3, adapter_config.json says 4",
        "nan": f"{DOWN}: it holds NaN",
        "integers": f"{DOWN}: the factors are no floats",
        "shape": rf"{DOWN}: lora_A is \[2, 48\], lora_B \[32, 3\]",
        "empty": "it holds no pair",
        "pickle": "a pickle, which can run code",
        "config": "is damaged",
        "another kind": "peft_type is LOHA",
    }
    with pytest.raises(ArtifactError, match=messages[spoil]):
        read_lora(folder)


def test_a_rank_past_the_engine_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "theirs", r=513)
    with pytest.raises(CannotLower, match=r"rank 513; vLLM takes up to 512.*task-vector --cut"):
        export(folder, "vllm", tmp_path / "ours")
    export(folder, "transformers", tmp_path / "ours")
    assert relative_error(under_peft(tmp_path / "ours"), under_peft(folder)) < 1e-5
