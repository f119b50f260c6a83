"""A text model inside a wrapper for images: its adapters carry the wrapper's names, and merging leaves the tower alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from compile_steer import api
from compile_steer.models.load import LoadedModel, load
from compile_steer.steering.program import Program
from compile_steer.steering.sites import Site
from tests.helpers.tiny import CONFIGS, HIDDEN, chat_tokenizer, intervention

# How vLLM names the modules of this wrapper: its `hf_to_vllm_mapper`, which it applies to the names of a LoRA too.
VLLM_PREFIXES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("wrapper") / "base"
    tokens = {"image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=CONFIGS["gemma3_text"], vision_config=VISION, **tokens)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return load(str(folder))


@pytest.fixture(scope="module")
def compiled(wrapped: LoadedModel) -> api.CompiledProgram:
    program = Program((replace(intervention(layer=1), site=Site(1, "resid_post")),), wrapped.id, wrapped.revision)
    texts = [f"w{n} w{n + 7} w{n + 20}" for n in range(8, 28)]
    return api.compile(wrapped, program, texts, backend="closed_form", calibration={"prompts": 20, "max_new_tokens": 4})


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(6, 80, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def test_the_adapter_loads_on_the_whole_wrapper(compiled: api.CompiledProgram, tmp_path: Path) -> None:
    assert compiled.model.layout.d_model == HIDDEN
    with compiled.applied():
        expected = logits(compiled.model.model)
    wrapper = Gemma3ForConditionalGeneration.from_pretrained(compiled.model.source).eval()
    plain = logits(wrapper)
    adapted = PeftModel.from_pretrained(wrapper, str(compiled.save(tmp_path / "adapter")))
    assert torch.allclose(logits(adapted), expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_every_name_of_the_adapter_is_a_module_in_vllm(compiled: api.CompiledProgram, tmp_path: Path) -> None:
    stored = load_file(compiled.save(tmp_path / "adapter") / "adapter_model.safetensors")
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in stored}
    for module in modules:
        old = next(prefix for prefix in VLLM_PREFIXES if module.startswith(prefix))
        assert module.replace(old, VLLM_PREFIXES[old]).startswith("language_model.model.layers.")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_wrapper_has_its_tower_byte_for_byte(
    compiled: api.CompiledProgram, precision: str, tmp_path: Path
) -> None:
    folder = api.merge(compiled, tmp_path / "merged", precision)
    before, after = (
        load_file(Path(compiled.model.source) / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    tower = [name for name in before if not name.startswith("language_model.") and "lm_head" not in name]
    assert len(tower) > 20
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in tower)
    text = after["language_model.model.layers.0.mlp.up_proj.weight"]
    assert text.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    if precision == "fp32":
        with compiled.applied():
            expected = logits(compiled.model.model)
        assert torch.allclose(
            logits(Gemma3ForConditionalGeneration.from_pretrained(folder).eval()), expected, atol=1e-5
        )
