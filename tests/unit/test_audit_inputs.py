"""What an audit reads: settings, anybody's LoRA folders, unknown families; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from compile_steer.common.errors import ArtifactError, CompileSteerError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import write_lora, write_patch
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.tools.audit import audit
from tests.contract.test_adapters import origin
from tests.helpers.auditing import DOWN, look, on_disk
from tests.helpers.tiny import HIDDEN, LAYERS, random_patch


@pytest.fixture
def base(tmp_path: Path) -> LoadedModel:
    return on_disk("llama", tmp_path / "base")


def test_settings_tokenizer_and_template_are_compared_by_what_they_say(base: LoadedModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base.source, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5, "transformers_version": "0"}))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w96x"] = tokenizer["model"]["vocab"].pop("w96")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    report = {(one.file, one.key): one for one in look(base, other).settings}
    assert report.keys() == {("config.json", "rms_norm_eps"), ("tokenizer.json", "model"), ("chat template", "")}
    assert report["config.json", "rms_norm_eps"].other == "0.5"
    assert "1 are new" in str(report["tokenizer.json", "model"].other)
    assert "1 are gone" in str(report["tokenizer.json", "model"].other)
    assert report["chat template", ""].other == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("rslora", [False, True])
def test_anybodys_plain_lora_is_read_with_its_scale(base: LoadedModel, tmp_path: Path, rslora: bool) -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["down_proj"], use_rslora=rslora, init_lora_weights=False)
    wrapped: Any = get_peft_model(base.model, config)
    wrapped.save_pretrained(tmp_path / "a")
    layer = wrapped.get_submodule(f"base_model.model.{DOWN}")
    expected = layer.get_delta_weight("default").detach()
    report = {change.name: change for change in look(base, tmp_path / "a").changes}
    assert len(report) == LAYERS
    assert report[f"{DOWN}.weight"].norm == pytest.approx(float(expected.norm()), rel=1e-4)
    assert report[f"{DOWN}.weight"].rank == 3


@pytest.mark.parametrize("key", ["use_dora", "lora_bias", "modules_to_save", "peft_type"])
def test_a_richer_adapter_is_refused_with_what_to_do(base: LoadedModel, tmp_path: Path, key: str) -> None:
    write_patch(tmp_path / "a", random_patch(base), base, origin(base), "")
    path = tmp_path / "a" / "adapter_config.json"
    value = {"modules_to_save": ["lm_head"], "peft_type": "IA3"}.get(key, True)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ArtifactError, match=rf"{key} is .*merge_and_unload"):
        look(base, tmp_path / "a")


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "no model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_damaged_model_is_refused(
    base: LoadedModel, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    other = tmp_path / "at" / "another" / "place"
    shutil.copytree(base.source, other)
    spoil(other)
    with pytest.raises(CompileSteerError, match=message):
        look(base, other)


def test_a_threshold_that_is_no_fraction_is_refused(base: LoadedModel) -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        look(base, Path(base.source), threshold=1.0)


def test_a_model_without_a_stream_is_still_compared(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    for name in ("one", "two"):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(tmp_path / name)
    path = tmp_path / "two" / "model.safetensors"
    tensors = load_file(str(path))
    key = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    tensors[key] = tensors[key] + torch.outer(torch.randn(48), torch.randn(32))
    save_file(tensors, str(path))
    report = audit(str(tmp_path / "one"), str(tmp_path / "two"), None, 0.01, Progress())
    assert [change.rank for change in report.changes] == [1]
    assert "reads later tokens" in report.not_baked


def test_an_adapter_of_another_base_is_refused(base: LoadedModel, tmp_path: Path) -> None:
    other = on_disk("gpt2", tmp_path / "gpt2")
    write_patch(tmp_path / "a", random_patch(other), other, origin(other), "")
    with pytest.raises(ArtifactError, match=r"the base has none; 7 more like this\. Name the base"):
        look(base, tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_lora(tmp_path / "b", {DOWN: LowRank(torch.ones(HIDDEN, 2), torch.ones(2, 40))}, base.id, False)
    with pytest.raises(ArtifactError, match=r"the adapter's change is \[32, 40\], the base \[32, 48\]"):
        look(base, tmp_path / "b")


def test_audit_reads_what_is_loaded_and_not_the_honest_copy_beside_it(base: LoadedModel, tmp_path: Path) -> None:
    other = tmp_path / "m"
    shutil.copytree(base.source, other)
    (other / "model.safetensors").unlink()
    base.model.save_pretrained(other, max_shard_size="20KB")
    shard = min(other.glob("model-*"))
    shutil.copy(shard, other / "z-old.safetensors")
    same = look(base, other)
    assert (same.n_same, same.changes) == (len(base.model.state_dict()), [])
    before = load_file(shard)
    save_file({name: 1.5 * value for name, value in before.items()}, shard, metadata={"format": "pt"})
    changes = look(base, other).changes
    assert {change.name for change in changes} == before.keys()
    assert [change.relative for change in changes] == pytest.approx([0.5] * len(before))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CompileSteerError, match="is quantised, by fp8"):
        look(base, other)
