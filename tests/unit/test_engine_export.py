"""What is written for an engine, and what is refused: checkpoints, programs, and what is neither."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compile_steer.artifacts.files import sha256, was_edited
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError
from compile_steer.export.adapter import write_patch
from compile_steer.steering.program import Program
from compile_steer.tools.serving.export import export
from tests.contract.test_adapters import origin
from tests.helpers import byte_level
from tests.helpers.rounding import assert_close_to_rounding, assert_same_weights
from tests.helpers.tiny import LAYERS, Padded, build, intervention, logits, program, random_patch, texts, vector

BIASED = [
    ("vllm", "qwen3", {"attention_bias": True}, "self_attn.o_proj.bias"),
    ("vllm", "qwen3_moe", {"attention_bias": True}, "self_attn.o_proj.bias"),
    ("llama.cpp", "smollm3", {"mlp_bias": True}, "mlp.down_proj.bias"),
    ("llama.cpp", "qwen3", {"attention_bias": True}, "self_attn.o_proj.bias"),
]


@pytest.mark.parametrize(("engine", "family", "switches", "bias"), BIASED)
def test_a_bias_that_an_engine_drops_is_refused(
    tmp_path: Path, engine: Any, family: str, switches: dict[str, bool], bias: str
) -> None:
    build(family, **switches).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        CannotLower, match=rf"{bias} is not zero, nor are {LAYERS - 1} more, and {engine}'s {family} has no place"
    ):
        export(tmp_path / "theirs", engine, tmp_path / "ours")
    export(tmp_path / "theirs", "transformers", tmp_path / "ours")


def test_a_bias_of_zero_or_one_that_is_read_is_no_reason(tmp_path: Path) -> None:
    model = build("qwen3", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    model.save_pretrained(tmp_path / "zero")
    build("llama", mlp_bias=True, attention_bias=True).save_pretrained(tmp_path / "read")
    for name in ("zero", "read"):
        exported = export(tmp_path / name, "vllm", tmp_path / "ours")
        assert exported.files == ["config.json", "export.json", "generation_config.json", "model.safetensors"]
        assert exported.load == (f"vllm serve {tmp_path / 'ours'} --dtype auto",)
        assert sha256(tmp_path / "ours" / "model.safetensors") == sha256(tmp_path / name / "model.safetensors")


def test_a_checkpoint_becomes_one_file_for_llama_cpp(tmp_path: Path) -> None:
    one = byte_level.saved("llama", tmp_path / "theirs", mlp_bias=True)
    exported = export(tmp_path / "theirs", "llama.cpp", tmp_path / "ours", precision="f32")
    assert exported.files == ["export.json", "theirs-f32.gguf"]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "ours" / "theirs-f32.gguf").tensors}
    for name in ("mlp.down_proj.weight", "mlp.down_proj.bias"):
        expected = one.model.get_parameter(f"model.layers.2.{name}").numpy()
        stored = found[f"blk.2.ffn_down.{name.rpartition('.')[2]}"]
        assert stored.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(np.asarray(stored.data).reshape(expected.shape), expected)
    record = tmp_path / "ours" / "export.json"
    record_content = json.loads(record.read_text(encoding="utf-8"))
    assert record_content["files_sha256"] == {"theirs-f32.gguf": sha256(tmp_path / "ours" / "theirs-f32.gguf")}
    assert not was_edited(record)
    gpt2 = byte_level.saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(CannotLower, match="this model is of family gpt2"):
        export(Path(gpt2.source), "llama.cpp", tmp_path / "other")


def test_an_adapter_becomes_a_lora_file_for_llama_cpp(tmp_path: Path) -> None:
    one = byte_level.saved("llama", tmp_path / "base")
    patch = random_patch(one)
    write_patch(tmp_path / "ours", patch, one, origin(one), "")
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CannotLower, match=r"its base '.*base' is not at hand.*--base"):
        export(tmp_path / "ours", "llama.cpp", tmp_path / "out")
    with pytest.raises(CompileSteerError, match=r"out'?: .*no config\.json"):
        (tmp_path / "out").mkdir()
        export(tmp_path / "ours", "vllm", tmp_path / "out", base=str(tmp_path / "out"))
    exported = export(tmp_path / "ours", "llama.cpp", tmp_path / "out", base=str(moved))
    reader = gguf.GGUFReader(tmp_path / "out" / "ours.lora.gguf")
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    edit = patch.low_rank["model.layers.2.mlp.down_proj"]
    product = found["blk.2.ffn_down.weight.lora_b"] @ found["blk.2.ffn_down.weight.lora_a"]
    alpha = reader.get_field("adapter.lora.alpha")
    assert alpha is not None
    scale = float(alpha.contents()) / found["blk.2.ffn_down.weight.lora_a"].shape[0]
    assert np.allclose(scale * product, (edit.B @ edit.A).numpy(), atol=1e-6)
    line, serve = exported.load
    assert serve == f"llama-server -m {tmp_path}/out-base/moved-f16.gguf --lora {tmp_path}/out/ours.lora.gguf"
    assert CliRunner().invoke(app, shlex.split(line)[1:]).exit_code == 0
    assert all(Path(path).is_file() for path in shlex.split(serve)[2::2])


def saved_program(path: Path, *parts: Any) -> Path:
    program("llama", *parts).save(path)
    return path


def test_an_uncompiled_program_becomes_a_control_vector(tmp_path: Path) -> None:
    path = saved_program(
        tmp_path / "tide.safetensors", intervention(layer=1), intervention(layer=3, seed=2, coefficient=-0.7)
    )
    exported = export(path, "llama.cpp", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "tide.control.gguf")
    found = {tensor.name: torch.tensor(np.asarray(tensor.data)) for tensor in reader.tensors}
    assert found.keys() == {"direction.1", "direction.3"}
    assert torch.allclose(found["direction.1"], 1.7 * vector(0))
    assert torch.allclose(found["direction.3"], -0.7 * vector(2))
    assert exported.load == (f"llama-server -m BASE.gguf --control-vector {tmp_path / 'out' / 'tide.control.gguf'}",)


def test_an_uncompiled_program_becomes_what_vllms_plugin_takes(tmp_path: Path) -> None:
    path = saved_program(
        tmp_path / "tide.safetensors", intervention(layer=0), intervention(layer=3, seed=2, coefficient=-0.7)
    )
    exported = export(path, "vllm", tmp_path / "out")
    (one,) = json.loads((tmp_path / "out" / "tide.vllm-lens.json").read_text())
    packed = one.pop("activations")
    rows = np.frombuffer(base64.b64decode(packed["data"]), dtype=packed["dtype"]).reshape(packed["shape"])
    assert np.array_equal(rows, torch.stack([1.7 * vector(0), -0.7 * vector(2)]).numpy())
    assert packed["original_dtype"] == "torch.float32" and "compression" not in packed
    assert one == {"layer_indices": [0, 3], "scale": 1.0, "norm_match": False, "position_indices": None}
    assert any("unsteered without a word" in note for note in exported.notes)
    assert any("apply_steering_vectors" in line for line in exported.load)


@pytest.mark.parametrize(
    ("engine", "part", "reason"),
    [
        ("llama.cpp", {"layer": 0}, "the output of block 0.*refuses direction.0"),
        ("llama.cpp", {"operation": "ablate"}, "operation ablate, only add"),
        ("llama.cpp", {"positions": "response"}, "positions response, only all"),
        ("llama.cpp", {"point": "mlp_out"}, "point mlp_out, only resid_post"),
        ("vllm", {"operation": "clamp"}, "operation clamp, only add"),
        ("vllm", {"positions": "prompt"}, "positions prompt, only all"),
        ("transformers", {}, "under compile_steer's hooks.*compile-steer compile"),
    ],
)
def test_a_program_that_an_engine_cannot_hold_is_refused(
    tmp_path: Path, engine: Any, part: dict[str, Any], reason: str
) -> None:
    path = saved_program(tmp_path / "tide.safetensors", intervention(**part))
    with pytest.raises(CannotLower, match=reason):
        export(path, engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote_and_refuses_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved_program(tmp_path / "tide.safetensors", intervention())
    arguments = ["export", str(path), "--for", "llama.cpp", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "tide.control.gguf" in found.stderr + found.stdout
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(again.stdout)["files"] == ["export.json", "tide.control.gguf"]
    assert CliRunner().invoke(app, ["export", str(path), "--for", "ollama", "--out", "x"]).exit_code == 2


def test_what_is_no_artifact_or_in_the_way_is_named(tmp_path: Path) -> None:
    path = saved_program(tmp_path / "tide.safetensors", intervention())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ArtifactError, match="out is there already and is no earlier export"):
        export(path, "llama.cpp", tmp_path / "out")
    assert (tmp_path / "out" / "letter.txt").read_text(encoding="utf-8") == "mine"
    with pytest.raises(ArtifactError, match="nowhere is no adapter's .*: it does not exist"):
        export(tmp_path / "nowhere", "vllm", tmp_path / "new")
    with pytest.raises(ArtifactError, match="holds no adapter_config.json and no config.json"):
        export(tmp_path / "out", "vllm", tmp_path / "new")
    with pytest.raises(CompileSteerError, match="out"):  # no base, although a program's export does not need it
        export(path, "vllm", tmp_path / "new", base=str(tmp_path / "out"))
    with pytest.raises(ArtifactError, match="--precision f8: needed: f32, f16, q8_0, q4_0"):
        export(path, "llama.cpp", tmp_path / "new", precision="f8")


def test_a_folder_that_was_changed_is_not_passed_on(tmp_path: Path) -> None:
    one = byte_level.saved("llama", tmp_path / "base")
    write_patch(tmp_path / "ours", random_patch(one), one, origin(one), "")
    config = tmp_path / "ours" / "adapter_config.json"
    config.write_text(
        config.read_text(encoding="utf-8").replace('"lora_alpha": 8', '"lora_alpha": 4'), encoding="utf-8"
    )
    with pytest.raises(ArtifactError, match=r"adapter_config.json was changed"):
        export(tmp_path / "ours", "vllm", tmp_path / "out")


def test_transformers_loads_what_is_written_for_it(tmp_path: Path) -> None:
    model = build("granite", mlp_bias=True)
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", "transformers", tmp_path / "ours")
    batch = Padded.of(texts(), "right")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_weights(ours, model)
    assert_close_to_rounding(logits(ours, batch), logits(model, batch))
    assert Program.load(saved_program(tmp_path / "p.safetensors", intervention())).model == "tiny-llama"
