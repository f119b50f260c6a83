"""`compile-steer run` on SmolLM2-135M: what it says, what it leaves, and who can load it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions, DistillOptions
from compile_steer.models.generate import continue_prompts
from compile_steer.models.reload import reload
from compile_steer.models.tokens import encode, pad
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Program
from compile_steer.tools.decompile import decompile
from compile_steer.tools.describe import describe_artifact
from tests.end_to_end.conftest import ROOT, FinishedRun, command

FIELDS = {
    "kind", "backend", "form", "divergence", "behaviour", "prompt_sets", "capability", "adapter", "rounding", "passed",
    "reasons", "sha256",
}  # fmt: skip
ARTIFACTS = ["adapters/ocean-closed_form", "merged/ocean-bias-fp32", "merged/ocean-closed_form-fp32"]

# Loads artifacts as a stranger would: compile_steer cannot be imported there.
PLAIN_LOADER = """
import sys, torch
sys.modules["compile_steer"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, ids, result, *folders = sys.argv[1:]
logits = []
for folder in folders:
    if "adapters" in folder:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits.append(model(input_ids=torch.load(ids, weights_only=True)).logits)
torch.save(logits, result)
"""


def test_run_succeeds_and_prints_verdict_plan_and_parities(finished: FinishedRun) -> None:
    assert finished.code == 0, finished.stdout + finished.stderr
    for text in ("Verdict on test data: PASS; score ", "; price: ", "perplexity of control text x",
                 "random directions of the same strength", "Ship ", "Plan for add +2", "refused",
                 "Compiled against steered", "closed_form merged-fp32", "too high"):  # fmt: skip
        assert text in finished.stdout


def test_every_artifact_has_a_parity_report_with_the_documented_fields(finished: FinishedRun) -> None:
    for name in ARTIFACTS:
        parity = finished.parity(name)
        assert parity.keys() >= FIELDS
        assert parity["passed"] and parity["reasons"] == []
        kl = parity["divergence"]
        assert kl["kl_remaining"]["value"] == pytest.approx(kl["kl"]["value"] / kl["kl_base"])
        assert len(parity["sha256"]["artifact"]) == 64


def test_bias_is_exact_and_closed_form_is_close(finished: FinishedRun) -> None:
    exact = finished.parity("merged/ocean-bias-fp32")["divergence"]
    assert exact["kl"]["value"] < 1e-6 and exact["top1"] >= 0.999
    near = finished.parity("adapters/ocean-closed_form")["divergence"]
    assert 1e-6 < near["kl_remaining"]["value"] < 0.02


def _plain_logits(base: str, folders: list[Path], ids: torch.Tensor, tmp_path: Path) -> list[torch.Tensor]:
    given, result = tmp_path / "ids.pt", tmp_path / "out.pt"
    torch.save(ids, given)
    arguments = [sys.executable, "-c", PLAIN_LOADER, base, *map(str, (given, result, *folders))]
    subprocess.run(arguments, check=True, capture_output=True)
    logits: list[torch.Tensor] = torch.load(result, weights_only=True)
    return logits


def test_transformers_and_peft_load_the_artifacts_without_compile_steer(
    finished: FinishedRun, opened: Run, tmp_path: Path
) -> None:
    batch = pad([encode(opened.model.tokenizer, replace(opened.data.heldout[0], response="The sea."))], [0], 0)
    with torch.no_grad():
        base = opened.model.model(input_ids=batch.input_ids).logits
        with steered(opened.model.model, opened.program, roles=batch.roles):
            wanted = opened.model.model(input_ids=batch.input_ids).logits
    folders = [finished.out / name for name in ARTIFACTS]
    adapter, exact, merged = _plain_logits(opened.model.source, folders, batch.input_ids, tmp_path)
    assert torch.allclose(exact, wanted, atol=1e-3)
    assert torch.allclose(adapter, merged, atol=1e-3)
    assert (adapter - wanted).norm() < 0.2 * (base - wanted).norm()


def test_program_file_has_the_documented_format(finished: FinishedRun) -> None:
    from safetensors import safe_open

    with safe_open(finished.paths.program, framework="pt") as file:
        program = json.loads(file.metadata()["program"])
        (entry,) = program["interventions"]
        assert entry.keys() >= {"layer", "point", "operation", "coefficient", "positions", "tensor"}
        assert (entry["layer"], entry["point"], entry["operation"], entry["coefficient"]) == (
            10,
            "resid_post",
            "add",
            2.5,
        )
        assert file.get_tensor(entry["tensor"]).shape == (576,)
    assert program["model"] == "smollm2-135m-instruct" and program["revision"].startswith("sha256:")


def test_recorded_hashes_link_data_program_adapter_and_checkpoint(finished: FinishedRun) -> None:
    from compile_steer.artifacts.files import sha256
    from compile_steer.artifacts.provenance import artifact_sha256

    adapter = json.loads((finished.out / "adapters/ocean-closed_form/compile_steer.json").read_text())
    merged = json.loads((finished.out / "merged/ocean-closed_form-fp32/compile_steer.json").read_text())
    assert adapter["program_sha256"] == merged["program_sha256"] == sha256(finished.paths.program)
    assert adapter["validation_sha256"] == sha256(finished.paths.validation)
    assert merged["parent"] == artifact_sha256(finished.out / "adapters/ocean-closed_form")
    assert adapter["verdict"] == "pass" and not adapter["forced"] and len(adapter["data_sha256"]) == 7


def test_compile_keeps_artifacts_made_from_the_same_inputs(finished: FinishedRun) -> None:
    weights = finished.out / "adapters/ocean-closed_form/adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    done = subprocess.run(
        command("compile", finished.recipe, "--out", finished.out, "--json"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert weights.stat().st_mtime_ns == before
    assert len(json.loads(done.stdout)) == 2


def test_the_work_folder_is_removed(finished: FinishedRun) -> None:
    assert not finished.paths.work.exists()


def test_training_brings_the_real_model_nearer_to_the_steered_one(opened: Run) -> None:
    """From a random start: from the closed form's, which leaves 0.01 %, there is nothing to train for."""
    options = CompileOptions(distill=DistillOptions(start="random", epochs=2, batch_tokens=256))
    lowering = Lowering(canonical(opened.program), opened.model, (), options)
    prompts = opened.data.calibration[:10]
    texts = continue_prompts(opened.model, prompts, opened.program, max_new_tokens=16, temperature=1.0, seed=1)
    lowering.__dict__["training_texts"] = texts
    patch = distill.lower(lowering)
    before, after = lowering.curves["distill"]["held_out_kl"]
    assert after < 0.9 * before, lowering.curves
    assert any(float(edit.B.abs().max()) > 0 for edit in patch.low_rank.values())


def test_page_is_self_contained_and_shows_the_verdict(finished: FinishedRun) -> None:
    page = finished.paths.report.read_text()
    assert "<svg" in page and "closed_form merged-fp32" in page and "What are you?" in page
    assert "<script" not in page and 'src="' not in page


def test_show_describes_every_kind_of_artifact(finished: FinishedRun) -> None:
    done = subprocess.run(
        command("show", finished.out / "adapters/ocean-bias", "--json"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["provenance"]["backend"] == "bias"
    kinds = {
        "vectors/ocean.safetensors": "program",
        "vectors/ocean.directions.safetensors": "directions",
        "vectors/ocean.validation.json": "validation report",
        "adapters/ocean-closed_form/parity.json": "parity report",
    }
    assert {name: describe_artifact(finished.out / name)["kind"] for name in kinds} == kinds


@pytest.mark.parametrize(("name", "cosine"), [("adapters/ocean-closed_form", 0.99), ("merged/ocean-bias-fp32", 0.9999)])
def test_decompile_finds_the_compiled_direction(finished: FinishedRun, opened: Run, name: str, cosine: float) -> None:
    few = replace(opened.data, train=opened.data.train[:12], neutral=opened.data.neutral[:6])
    found = decompile(opened.model, reload(finished.out / name, opened.model), few, opened.progress)
    (wanted,) = opened.program.interventions
    (got,) = [i for i in found.program.interventions if i.site.layer == wanted.site.layer]
    assert float(torch.cosine_similarity(got.vector, wanted.vector, dim=0)) > cosine
    assert float(got.vector.norm()) == pytest.approx(wanted.coefficient * float(wanted.vector.norm()), rel=0.05)
    assert found.explained > 0.95


def test_a_saved_program_has_the_same_bits(finished: FinishedRun, tmp_path: Path) -> None:
    program = Program.load(finished.paths.program)
    program.save(tmp_path / "again.safetensors")
    again = Program.load(tmp_path / "again.safetensors")
    assert torch.equal(again.interventions[0].vector, program.interventions[0].vector)
