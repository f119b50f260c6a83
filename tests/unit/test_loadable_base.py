"""What is written names a base that other tools can load, its licence, and how its verification ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CannotLower, RecipeError
from compile_steer.export.adapter import patch_provenance, write_patch
from compile_steer.export.engine_support import engine_support
from compile_steer.export.gguf import write_gguf_file
from compile_steer.models.gguf import license_in
from compile_steer.models.load import LoadedModel, load
from compile_steer.models.source import find_model
from compile_steer.pipeline.artifacts import verify
from compile_steer.report.card import model_card
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.tools.serving.export import export, export_base
from tests.contract.test_adapters import origin
from tests.helpers import byte_level
from tests.helpers.small_run import SmallRun
from tests.helpers.tiny import Padded, intervention, logits, program, random_patch, texts


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A GGUF file as a base."""
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / "cache"))
    write_gguf_file(tmp_path / "a b.gguf", WeightPatch(), byte_level.saved("llama", tmp_path / "plain"), "f16", "a b")
    return load(str(tmp_path / "a b.gguf"))


def test_an_adapter_of_a_gguf_file_names_a_folder_that_peft_loads(base: LoadedModel, tmp_path: Path) -> None:
    patch, batch = random_patch(base), Padded.of(texts(), "right")
    write_patch(tmp_path / "ours", patch, base, origin(base), "")
    with with_patch(base.model, patch):
        expected = logits(base.model, batch)
    for folder in (tmp_path / "ours", export(tmp_path / "ours", "vllm", tmp_path / "served").folder):
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert torch.allclose(logits(adapted, batch), expected, atol=1e-5)
    # An adapter of an earlier version, or of anybody, that names the file itself.
    config = tmp_path / "served" / "adapter_config.json"
    config.write_text(config.read_text().replace(base.loadable, base.id))
    exported = export(tmp_path / "served", "transformers", tmp_path / "again")
    names: dict[str, Any] = {}
    exec("\n".join(exported.load), names)
    assert torch.allclose(logits(names["model"].eval(), batch), expected, atol=1e-5)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_printed_lines_name_no_gguf_file(base: LoadedModel, tmp_path: Path, engine: Any) -> None:
    write_patch(tmp_path / "ours", random_patch(base), base, origin(base), "")
    lines = export(tmp_path / "ours", engine, tmp_path / "served").load
    assert base.source in " ".join(lines) and ".gguf" not in " ".join(lines)
    if engine == "vllm":
        own = program("llama", intervention())
        type(own)(own.interventions, base.id, base.revision).save(tmp_path / "tide.safetensors")
        lines = export(tmp_path / "tide.safetensors", "vllm", tmp_path / "vector").load
        assert base.source in lines[0] and ".gguf" not in lines[0]


def test_a_relative_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level.saved("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    loaded = load("./model")
    write_patch(tmp_path / "ours", random_patch(loaded), loaded, origin(loaded), "")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "model").resolve()) == find_model("./model").loadable


def test_base_writes_the_very_weights(base: LoadedModel, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["base", base.id, "--out", str(tmp_path / "folder")])
    assert done.exit_code == 0, done.output
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in base.model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").chat_template == base.tokenizer.chat_template
    assert load(str(tmp_path / "folder")).revision.partition("+")[0] == base.revision.partition("+")[0]
    with pytest.raises(ArtifactError, match="folder is there already"):
        export_base(base.id, tmp_path / "folder")
    with pytest.raises(RecipeError, match="no such file"):
        export_base(str(tmp_path / "not.gguf"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_card_of_an_adapter_says_how_its_base_is_written(base: LoadedModel) -> None:
    first, *others = engine_support(origin(base), Path("made"))
    (line,) = first.commands
    assert line == f"compile-steer base '{base.id}' --out base"
    assert all(base.id not in command for engine in others for command in engine.commands)
    assert any("vllm serve base" in command for engine in others for command in engine.commands)


def test_the_licence_is_that_of_the_file(base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.license == ""  # the file says nothing
    for number, (name, written) in enumerate([("apache-2.0", "apache-2.0"), ("a: b\n---", "")]):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.add_license(name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        found = license_in(tmp_path / "x.gguf")
        assert found == name
        monkeypatch.setattr("compile_steer.models.source.license_in", lambda _file, found=found: found)
        monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path / f"cache-{number}"))
        assert load(base.id).license == written
    folder = Path(base.source).parent / "licensed"
    export_base(base.id, folder)
    (folder / "README.md").write_text("---\nlicense: gemma\ntags: [x]\n---\nA model.\n")
    assert "licence: gemma" in export_base(str(folder), tmp_path / "copy").notes
    licensed = load(str(tmp_path / "copy"))
    assert licensed.license == "gemma"
    record = patch_provenance("tide", "bias", random_patch(licensed), licensed, program("llama"), 0.0)
    card = model_card(record, tmp_path, None)
    assert "\nlicense: gemma\n" in card and "# license: fill in" not in card


def test_what_failed_its_verification_is_not_exported_without_force(run: SmallRun, tmp_path: Path) -> None:
    folder, out = run.paths.merged("closed_form", "fp32"), tmp_path / "served"
    assert any("not verified" in note for note in export(folder, "vllm", out).notes)
    (parity,) = verify(run.open(), [folder])
    assert not parity.passed
    with pytest.raises(CannotLower, match=r"(?s)failed its verification: KL .*--force"):
        export(folder, "vllm", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert any("FAILED" in note for note in export(folder, "vllm", tmp_path / "other", force=True).notes)
