"""GGUF files: what stock readers find in them is the merged sum, rounded once, and what llama.cpp is to add to a base."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.export.engine_support import GGUF_FILE
from compile_steer.export.gguf import TensorNames, config_refusals, write_gguf, write_lora_gguf
from compile_steer.export.gguf_tokenizer import tokenizer_fields
from compile_steer.export.merged import merged_model
from compile_steer.models.gguf import gguf_tensors
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.reload import reload
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from tests.helpers import byte_level
from tests.helpers.tiny import CONFIGS, HIDDEN, build, loaded, random_patch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HALF = 65504.0
Save = Callable[[str], LoadedModel]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Save:
    return cache(lambda family: byte_level.saved(family, tmp_path_factory.mktemp(family)))


def origin(one: LoadedModel, form: str) -> Provenance:
    return Provenance(
        "tide", "closed_form", form, one.id, one.revision, "tide.safetensors", "", "", "pass", False, "", {}, 1, 0.0, "",
    )  # fmt: skip


def written(folder: Path, patch: WeightPatch, one: LoadedModel, precision: str) -> Path:
    write_gguf(folder, patch, one, precision, origin(one, f"gguf-{precision}"), "a card")
    return folder


def step(values: Tensor, levels: int) -> Tensor:
    """The largest error that rounding to so many levels a side leaves in blocks of 32, and of their scales."""
    blocks = values.reshape(-1, 32).abs().amax(dim=1, keepdim=True)
    return (blocks * (0.5 / levels + 2**-10) * 1.01).expand(-1, 32).reshape(values.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_reads_back_the_sum_rounded_once(base: Save, tmp_path: Path, family: str) -> None:
    one = base(family)
    patch = random_patch(one)
    expected = dict(merged_model(one.source, patch).requires_grad_(False).named_parameters())
    stored = reload(written(tmp_path / "f16", patch, one, "f16"), one)
    for name, value in stored.model.named_parameters():
        exact = expected[name] if expected[name].ndim == 1 else expected[name].half().float()
        assert torch.equal(value, exact), name
    quantised = reload(written(tmp_path / "q8_0", patch, one, "q8_0"), one)
    for name, value in quantised.model.named_parameters():
        whole = expected[name].shape[-1] % 32 == 0 and expected[name].ndim > 1
        error = (value - expected[name]).abs()
        assert bool((error <= (step(expected[name], 127) if whole else 2**-11 * expected[name].abs() + 1e-7)).all()), (
            name
        )
        assert not whole or float(error.max()) > 0, name
    for text in ("he wrote w1 12 times", "<s> user he w </s> w1"):
        assert stored.tokenizer(text)["input_ids"] == one.tokenizer(text)["input_ids"]
    assert stored.tokenizer.chat_template == one.tokenizer.chat_template
    assert (tmp_path / "f16" / "README.md").read_text("utf-8") == "a card"


def test_four_bits_are_four_bits_but_for_the_matrix_that_gives_the_logits(base: Save, tmp_path: Path) -> None:
    for family, logits in (("llama", "output.weight"), ("qwen2", "token_embd.weight")):  # qwen2's here is tied
        one = base(family)
        path = written(tmp_path / family, random_patch(one), one, "q4_0") / GGUF_FILE
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert kinds[logits] == "Q8_0" and kinds["blk.1.attn_q.weight"] == "Q4_0"
        assert kinds["blk.1.ffn_down.weight"] == "F16"  # 48 wide: no whole number of blocks
        assert kinds["blk.1.attn_norm.weight"] == "F32"
        assert family != "llama" or kinds["token_embd.weight"] == "Q4_0"
        query, name = gguf_tensors(path)["blk.1.attn_q.weight"], "model.layers.1.self_attn.q_proj.weight"
        model = merged_model(one.source, random_patch(one))
        expected = TensorNames(model.config).rows(name, model.get_parameter(name))
        assert bool(((query - expected).abs() <= 2 * step(expected, 8)).all())


@pytest.mark.parametrize(("family", "architecture"), [("llama", ""), ("qwen2", "llama"), ("mistral", "llama")])
def test_an_exact_bias_stays_exact_in_every_precision(
    base: Save, tmp_path: Path, family: str, architecture: str
) -> None:
    """Also where the checkpoint is rewritten as Llama's, which has the place for it."""
    one = base(family)
    shift = torch.linspace(-3, 3, HIDDEN)
    bias = {"model.layers.2.mlp.down_proj": shift}
    patch = WeightPatch(bias=bias, config_flags=("mlp_bias",), architecture=architecture)
    stored = reload(written(tmp_path / "q4_0", patch, one, "q4_0"), one).model
    assert torch.equal(stored.get_parameter("model.layers.2.mlp.down_proj.bias"), shift)
    assert float(stored.get_parameter("model.layers.1.mlp.down_proj.bias").abs().max()) == 0
    assert stored.config.model_type == "llama" and stored.config.mlp_bias
    assert stored.config.attention_bias == (family == "qwen2")
    if family == "qwen2":
        name = "model.layers.1.self_attn.k_proj.bias"
        assert torch.equal(stored.get_parameter(name), one.model.get_parameter(name))


def test_llama_3_rotates_as_slowly_when_it_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {
        "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    one = byte_level.saved("llama", tmp_path / "base", rope_parameters=slow)
    folder = written(tmp_path / "f16", 1e-9 * random_patch(one), one, "f16")
    factors = gguf_tensors(folder / GGUF_FILE)["rope_freqs.weight"]
    assert float(factors[0]) == pytest.approx(1.0) and float(factors[-1]) == pytest.approx(8.0) and len(factors) == 6
    stored, ids = reload(folder, one).model, torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(stored.model.rotary_emb.inv_freq, one.model.model.rotary_emb.inv_freq)
    error, size = (one.model(ids).logits - stored(ids).logits).norm(), one.model(ids).logits.norm()
    assert float(error / size) < 5e-3
    stored.model.rotary_emb.inv_freq = stored.model.rotary_emb.inv_freq * factors
    assert float((one.model(ids).logits - stored(ids).logits).norm() / size) > 0.05
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArtifactError, match=r"rope_freqs\.weight scales its rotations, .* the publisher's folder"):
        load(str(folder / GGUF_FILE), device="cpu")


def rotated(x: Tensor, angles: Tensor, *, neighbours: bool) -> Tensor:
    """Rotary embedding of one head's rows x [d]: of rows 2i and 2i + 1, or of rows i and i + d/2."""
    first, second = (x[0::2], x[1::2]) if neighbours else x.chunk(2)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()])


@pytest.mark.parametrize(("module", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_neighbouring_rows_rotate_as_halves_do(module: str, heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    d_head, x = 12, torch.randn(HIDDEN, generator=generator)
    weight = torch.randn(heads * d_head, HIDDEN, generator=generator)
    angles = torch.rand(d_head // 2, generator=generator)
    ours = TensorNames(build("llama").config).rows(f"model.layers.0.self_attn.{module}.weight", weight)
    for here, there in zip((weight @ x).chunk(heads), (ours @ x).chunk(heads), strict=True):
        expected = rotated(here, angles, neighbours=False)
        torch.testing.assert_close(rotated(there, angles, neighbours=True), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_lora_file_adds_to_the_base_file_what_the_merged_file_has(base: Save, tmp_path: Path, family: str) -> None:
    one = base(family)
    write_patch(tmp_path / "adapter", random_patch(one), one, origin(one, "adapter"), "")
    patch = read_patch(tmp_path / "adapter")
    write_lora_gguf(tmp_path / "lora.gguf", patch, one.model.config)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", family)
    factors = gguf_tensors(tmp_path / "lora.gguf")
    names = sorted({name.rpartition(".")[0] for name in factors})
    assert len(names) == len(patch.low_rank) and said["adapter.lora.alpha"] == factors[f"{names[0]}.lora_a"].shape[0]
    plain = gguf_tensors(written(tmp_path / "plain", 1e-9 * patch, one, "f16") / GGUF_FILE)
    merged = gguf_tensors(written(tmp_path / "merged", patch, one, "f16") / GGUF_FILE)
    for name in names:
        change = factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        assert float(change.norm()) > 0.1
        torch.testing.assert_close(plain[name] + change, merged[name], rtol=2e-3, atol=2e-3)


def test_a_lora_file_holds_no_more_than_a_lora(tmp_path: Path) -> None:
    config = build("qwen2").config
    edit = LowRank(torch.ones(97, 2), torch.ones(2, HIDDEN))
    patch = WeightPatch({"lm_head": edit}, bias={"model.layers.1.mlp.down_proj": torch.ones(HIDDEN)})
    with pytest.raises(ArtifactError, match=r"cannot hold biases; merge the patch\.\n.*cannot edit lm_head"):
        write_lora_gguf(tmp_path / "lora.gguf", patch, config)
    with pytest.raises(ArtifactError, match="edits nothing"):
        write_lora_gguf(tmp_path / "lora.gguf", WeightPatch(), config)
    assert not list(tmp_path.iterdir())


def test_a_value_beyond_half_precision_names_its_module(base: Save, tmp_path: Path) -> None:
    one, name = base("llama"), "model.layers.1.mlp.down_proj"
    patch = WeightPatch({name: LowRank(torch.full((HIDDEN, 1), 3.0), torch.full((1, 48), HALF))})
    with pytest.raises(ArtifactError, match=rf"{name}\.weight holds 1\.965e\+05, beyond 6\.55e\+04, .* of F16"):
        write_gguf(tmp_path / "merged", patch, one, "f16", origin(one, "gguf-f16"), "")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- refusals


def test_what_llama_cpp_would_compute_otherwise_is_refused_all_at_once(tmp_path: Path) -> None:
    for family in CONFIGS.keys() - {*FAMILIES, "gemma3_text"}:  # which has a test of its own
        (reason,) = config_refusals(loaded(family).model.config)
        assert f"this model is of family {family}. " in reason and "llama, mistral, qwen2, qwen3" in reason
    assert [config_refusals(loaded(family).model.config) for family in FAMILIES] == [[]] * 4
    for family, changes, expected in (
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
        ("qwen3", {"attention_bias": True}, "biases, which llama.cpp's graph of qwen3 does not read"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope type 'linear' of llama",
        ),
    ):
        (reason,) = config_refusals(build(family, **changes).config)
        assert expected in reason, (family, reason)
    one = byte_level.saved("llama", tmp_path / "base", hidden_act="gelu")
    words = loaded("llama").tokenizer
    odd = LoadedModel(one.model, words, one.id, one.revision, one.source)
    with pytest.raises(
        CannotLower, match=r"gelu[\s\S]*WordLevel that splits text by .*WhitespaceSplit.*byte-level BPE"
    ):
        write_gguf(tmp_path / "merged", random_patch(one), odd, "f16", origin(one, "gguf-f16"), "")


SPLITS: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("name", [*SPLITS, ""])
def test_the_splitting_of_text_is_named_or_refused(base: Save, name: str) -> None:
    steps = SPLITS.get(name, r"\w+")
    if isinstance(steps, str):
        steps = [
            pre_tokenizers.Split(Regex(steps), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    split = pre_tokenizers.Sequence(steps) if isinstance(steps, list) else steps
    one = base("llama")
    asked = LoadedModel(one.model, byte_level.tokenizer(split), one.id, one.revision, one.source)
    if not name:
        with pytest.raises(CannotLower, match=r"splits text by \\w\+; needed"):
            tokenizer_fields(asked, byte_level.VOCAB)
        return
    with pytest.raises(CannotLower, match="tokens go up to 261, the embeddings have 200 rows"):
        tokenizer_fields(asked, 200)
    fields = {field.key: field.value for field in tokenizer_fields(asked, byte_level.VOCAB)}
    assert fields["tokenizer.ggml.pre"] == name
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == byte_level.VOCAB and tokens[-1] == f"[PAD{byte_level.VOCAB - 1}]"
    assert types[:4] == [3, 3, 3, 1] and types[-1] == 5 and fields["tokenizer.ggml.merges"][0] == "h e"
    assert fields["tokenizer.ggml.eos_token_id"] == 2 and fields["tokenizer.ggml.add_bos_token"] is False


def test_a_base_that_is_a_gguf_keeps_its_own_tokenizer_fields(
    base: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    one = base("llama")
    name, shift = "model.layers.2.mlp.down_proj", torch.linspace(-3, 3, HIDDEN)
    patch = random_patch(one) + WeightPatch(bias={name: shift}, config_flags=("mlp_bias",))
    first = written(tmp_path / "first", patch, one, "q8_0") / GGUF_FILE
    again = load(str(first), device="cpu")
    assert torch.equal(again.model.get_parameter(f"{name}.bias"), shift), "no config of a GGUF says that there is one"
    second = written(tmp_path / "second", 1e-9 * random_patch(one), again, "q8_0") / GGUF_FILE
    kept = [
        {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
        for path in (first, second)
    ]
    assert json.dumps(kept[0]) == json.dumps(kept[1])
    for name, value in gguf_tensors(first).items():
        np.testing.assert_allclose(gguf_tensors(second)[name], value, rtol=2e-3, atol=1e-4, err_msg=name)
