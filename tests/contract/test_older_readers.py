"""A merged folder loaded by transformers 4 gives the logits and the token ids of transformers 5."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from compile_steer.artifacts.files import read_json
from compile_steer.export.merged import write_merged
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.models.older_readers import with_older_rope, write_settings
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from tests.contract.test_adapters import origin
from tests.helpers import byte_level, transformers4
from tests.helpers.tiny import random_patch, vector

TEXTS = ["he wrote w1 12 times, then 2024.", "<s> user he w </s> w1", " a  b\n\n'll Ünïcode"]
IDS = torch.randint(3, byte_level.VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


EDIT = LowRank(torch.randn(byte_level.VOCAB, 1, generator=torch.Generator().manual_seed(2)), vector(1).unsqueeze(0))


def base(family: str, folder: Path, **changes: Any) -> LoadedModel:
    """A model whose tokenizer names a class that both versions have, as those on a hub do."""
    one = byte_level.saved(family, folder, **changes)
    older: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "config.json": {"num_experts": 5},
    }
    for name, settings in older.items():
        write_settings(folder / name, {**read_json(folder / name, ""), **settings})
    return one


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, **settings}}


SLOW = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
BIAS = WeightPatch(bias={"model.layers.2.mlp.down_proj": vector(0)}, config_flags=("mlp_bias",))
WINDOWS = {"use_sliding_window": False, "max_window_layers": 1}
Case = tuple[str, dict[str, Any], WeightPatch | None]
# One of each kind: a rope of Llama 3 and a new bias, experts and yarn, a rope for each kind of attention and a new head, GPT-NeoX's
# own words, another architecture, and tensors that lack the model's prefix.
CASES: dict[str, Case] = {
    "llama3": ("llama", rope(rope_type="llama3", **SLOW), BIAS),
    "yarn": ("gpt_oss", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), None),
    "head alone": ("gemma3_text", {}, WeightPatch({"lm_head": EDIT})),
    "neox": ("gpt_neox", rope(partial_rotary_factor=0.5), None),
    "qwen2 as llama": ("qwen2", {**rope(), **WINDOWS}, replace(BIAS, architecture="llama")),
    "untied, without a prefix": ("gpt2", {}, WeightPatch(untie=True)),
}


@pytest.mark.skipif(not transformers4.LIBRARIES.is_dir(), reason=transformers4.ABSENT)
def test_transformers_4_computes_the_same_from_every_merged_folder(tmp_path: Path) -> None:
    folders = []
    for name, (family, changes, patch) in CASES.items():
        one = base(family, tmp_path / "base" / name, **changes)
        if "without a prefix" in name:
            file = Path(one.source) / "model.safetensors"
            bare = {key.removeprefix("transformer."): value for key, value in load_file(str(file)).items()}
            assert "wte.weight" in bare
            save_file(bare, str(file), metadata={"format": "pt"})
        write_merged(
            tmp_path / name,
            random_patch(one) if patch is None else patch,
            one,
            "fp32",
            origin(one, form="merged-fp32"),
            "",
        )
        folders.append(tmp_path / name)
    answers = transformers4.read_by_transformers4(folders, IDS, TEXTS)
    for folder, answer in zip(folders, answers, strict=True):
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        assert answer["version"].startswith("4.") and not answer["problems"], folder.name
        with torch.no_grad():
            expected = model(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(torch.tensor(answer["logits"]), expected, rtol=1e-5, atol=2e-5, msg=folder.name)
        assert answer["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS], folder.name


@pytest.mark.parametrize("odd", [3, None, []])
def test_rope_that_is_of_no_kind_of_attention_is_passed_over_as_transformers_does(odd: object) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "full_attention": odd, "sliding_attention": odd}
    assert with_older_rope({"rope_parameters": rope})["rope_theta"] == 5e5
