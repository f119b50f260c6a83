"""The model card: every number is of this very artifact, and what is not known is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from compile_steer.artifacts.files import save_record, sha256
from compile_steer.artifacts.provenance import Provenance
from compile_steer.export.engine_support import EngineSupport, engine_support
from compile_steer.pipeline.artifacts import verify
from compile_steer.report.card import model_card, update_card
from compile_steer.report.render import markdown
from compile_steer.validation.report import Confound, ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun


def how(origin: Provenance) -> list[EngineSupport]:
    return engine_support(origin, Path("made"))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_shows_the_parity_only_after_verification(run: SmallRun) -> None:
    folder = run.paths.merged("closed_form", "fp32")
    before = card(folder)
    assert "| verification | not verified |" in before
    assert "| Is this file the steered model? | Not verified |" in before
    assert "top-1" not in before
    (parity,) = verify(run.open(), [folder])
    after = card(folder)
    unchecked = ", ".join(dict.fromkeys(check.name for check in parity.unchecked))
    assert f"| verification | **failed**; not checked: {unchecked} |" in after and "score" in unchecked
    assert all(f"- Not checked: {check.name} ({markdown(check.text)})" in after for check in parity.unchecked)
    assert f"{100 * parity.divergence.top1:.2f} %" in after
    assert f"{parity.divergence.kl.value:.2g}" in after
    assert all(reason in after for reason in parity.reasons)
    passed = card(run.paths.merged("bias", "fp32"))
    (verdict,) = [row for row in passed.splitlines() if row.startswith("| verification |")]
    assert verdict.startswith("| verification | passed") and "score" not in verdict, (
        "its score is shown to be equivalent"
    )
    assert "| Is this file the steered model? | Yes: " in passed
    # The card is a report about the folder: writing it again changes nothing that is hashed.
    Provenance.read_unedited(folder)


def test_the_verdict_has_its_numbers_and_intervals(run: SmallRun) -> None:
    report = ValidationReport.load(run.paths.validation)
    for folder in (run.paths.adapter("bias"), run.paths.merged("bias", "fp32")):
        text = card(folder)
        effect = report.margin
        assert f"{effect.value:+.3f} [{effect.low:+.3f}, {effect.high:+.3f}]" in text
        assert all(f"- {reason}" in text for reason in report.reasons)
        assert "fail, **compiled with --force in spite of it**" in text
        assert "## Limits" in text


def test_a_card_names_what_the_direction_is_confounded_with(run: SmallRun, tmp_path: Path) -> None:
    confound, path = Confound("the answer A", "30 of 40", "Swap."), tmp_path / "report.json"
    replace(ValidationReport.load(run.paths.validation), confounds=[confound]).save(path)
    origin = replace(Provenance.read(run.paths.adapter("bias")), validation_sha256=sha256(path))
    assert "- confounded with the answer A: 30 of 40. Swap." in model_card(origin, tmp_path, path)


@pytest.mark.parametrize("case", ["another's parity", "edited parity", "other weights"])
def test_numbers_of_another_artifact_are_never_shown(run: SmallRun, case: str) -> None:
    folder, other = run.paths.adapter("closed_form"), run.paths.merged("bias", "fp32")
    if case == "another's parity":
        shutil.copy(other / "parity.json", folder / "parity.json")
    elif case == "edited parity":
        content = json.loads((folder / "parity.json").read_text())
        (folder / "parity.json").write_text(json.dumps({**content, "passed": True, "reasons": []}))
    else:
        (folder / "adapter_config.json").write_text("{}")
    update_card(folder, run.paths.validation)
    assert "| verification | not verified |" in card(folder)
    assert "there is no `parity.json` that is of these weights" in card(folder)


def test_the_numbers_of_another_validation_are_not_shown(run: SmallRun) -> None:
    path, folder = run.paths.validation, run.paths.adapter("closed_form")
    content = json.loads(path.read_text())
    save_record(path, {**{k: v for k, v in content.items() if k != "record_sha256"}, "n_pairs": 999})
    update_card(folder, path)
    text = card(folder)
    assert "999 pairs" not in text  # a hash may hold the number
    assert "does not lie beside this artifact, or is not the one" in text
    path.unlink()
    update_card(folder, path)
    assert "does not lie beside this artifact" in card(folder)
    assert "top-1" in card(folder), "its own parity is still there"


def test_fields_that_a_person_filled_in_are_kept(run: SmallRun) -> None:
    folder = run.paths.adapter("closed_form")
    header = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    assert header["library_name"] == "peft"
    assert "license" not in header
    assert "base_model" not in header, "a local path is no id"
    text = card(folder).replace("# license: fill in", "license: apache-2.0 #").replace(
        "# base_model: fill in", "base_model: some/base #"
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    update_card(folder, run.paths.validation)
    header = ModelCard.load(folder / "README.md").data.to_dict()
    assert (header["license"], header["base_model"]) == ("apache-2.0", "some/base")
    (folder / "README.md").write_text("---\n: [\n---\n", encoding="utf-8")
    update_card(folder, run.paths.validation)
    assert "# license: fill in" in card(folder)
    (folder / "README.md").unlink()
    update_card(folder, run.paths.validation)
    assert "# license: fill in" in card(folder)


def test_a_hub_base_is_named(run: SmallRun) -> None:
    origin = replace(Provenance.read(run.paths.adapter("bias")), model="some/base", revision="hub:abc")
    assert "\nbase_model: some/base\n" in model_card(origin, Path("made"), None)


def test_each_engine_is_told_what_it_can_load(run: SmallRun) -> None:
    patch = Provenance.read(run.paths.adapter("bias"))
    assert [engine.commands for engine in how(patch)] == [()]
    text = card(run.paths.adapter("bias"))
    assert "transformers, vLLM, llama.cpp: none of them loads this patch" in text
    assert "from_pretrained" not in text
    adapter = Provenance.read(run.paths.adapter("closed_form"))
    assert all(engine.commands for engine in how(adapter))
    assert "--lora-modules" in card(run.paths.adapter("closed_form"))
    merged = Provenance.read(run.paths.merged("bias", "fp32"))
    assert (merged.architecture, merged.biases) == ("llama", 1)
    assert all(engine.commands for engine in how(merged))
    assert "biases of llama, which its own code adds." in card(run.paths.merged("bias", "fp32"))
    transformers, _serve, vllm, llama_cpp = how(replace(merged, architecture="smollm3"))
    assert transformers.commands and vllm.commands
    assert vllm.note.endswith("which its own code adds; not tried with smollm3.")
    assert (llama_cpp.commands, "cannot hold it" in llama_cpp.note) == ((), True)
    _transformers, _serve, vllm, llama_cpp = how(replace(merged, architecture="qwen3"))
    assert (vllm.commands, "cannot hold it" in vllm.note) == ((), True)
    assert not llama_cpp.commands
    assert all(engine.commands for engine in how(replace(merged, architecture="qwen3", biases=0)))


def test_a_parity_of_a_report_that_is_damaged_is_an_error(run: SmallRun) -> None:
    folder = run.paths.adapter("closed_form")
    parity = Parity.load(folder / "parity.json")
    assert parity.behaviour.n_pairs == 8
    (folder / "parity.json").write_text("{", encoding="utf-8")
    with pytest.raises(Exception, match=r"parity\.json is damaged"):
        update_card(folder, run.paths.validation)
