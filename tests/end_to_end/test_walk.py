"""`compile-steer run` on SmolLM2-135M: what it says, what it leaves, and who can load it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compile_steer.models.reload import reload
from compile_steer.models.tokens import encode, pad
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from compile_steer.tools.decompile import decompile
from compile_steer.tools.lineage import describe_artifact
from tests.end_to_end.conftest import RECIPE, ROOT, Walk, command

FIELDS = {
    "kind", "backend", "form", "divergence", "behaviour", "prompt_sets", "capability", "adapter", "rounding", "passed",
    "reasons", "sha256",
}  # fmt: skip
ARTIFACTS = [
    "adapters/ocean-closed_form", "adapters/ocean-distill",
    "merged/ocean-bias-fp32", "merged/ocean-closed_form-fp32", "merged/ocean-distill-fp32",
]  # fmt: skip

# Loads an artifact as a stranger would: compile_steer cannot be imported there.
PLAIN_LOADER = """
import sys, torch
sys.modules["compile_steer"] = None
from transformers import AutoModelForCausalLM
kind, base, folder, ids, result = sys.argv[1:]
if kind == "adapter":
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    torch.save(model(input_ids=torch.load(ids, weights_only=True)).logits, result)
"""


def test_the_walk_ends_well_and_says_what_it_found(walk: Walk) -> None:
    assert walk.code == 0, walk.stdout + walk.stderr
    for text in ("Verdict on test data: PASS", "random directions of the same strength", "Plan for add +2", "refused",
                 "Compiled against steered", "closed_form merged-fp32", "too high"):  # fmt: skip
        assert text in walk.stdout


def test_every_artifact_has_a_parity_report_with_the_promised_fields(walk: Walk) -> None:
    for name in ARTIFACTS:
        parity = json.loads((walk.out / name / "parity.json").read_text())
        assert parity.keys() >= FIELDS
        assert parity["passed"] and parity["reasons"] == []
        kl = parity["divergence"]
        assert kl["kl_remaining"]["value"] == pytest.approx(kl["kl"]["value"] / kl["kl_base"])
        assert len(parity["sha256"]["artifact"]) == 64


def test_the_bias_is_exact_and_the_closed_form_is_close(walk: Walk) -> None:
    exact = json.loads((walk.out / "merged/ocean-bias-fp32/parity.json").read_text())
    assert exact["divergence"]["kl"]["value"] < 1e-6 and exact["divergence"]["top1"] >= 0.999
    near = json.loads((walk.out / "adapters/ocean-closed_form/parity.json").read_text())
    assert 1e-6 < near["divergence"]["kl_remaining"]["value"] < 0.02


def _plain_logits(kind: str, base: str, folder: Path, ids: torch.Tensor, tmp_path: Path) -> torch.Tensor:
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [
        sys.executable,
        "-c",
        PLAIN_LOADER,
        kind,
        base,
        str(folder),
        str(tmp_path / "ids.pt"),
        str(tmp_path / "out.pt"),
    ]
    subprocess.run(arguments, check=True, capture_output=True)
    logits: torch.Tensor = torch.load(tmp_path / "out.pt", weights_only=True)
    return logits


def test_stock_libraries_load_the_results_without_compile_steer(walk: Walk, opened: Run, tmp_path: Path) -> None:
    batch = pad([encode(opened.model.tokenizer, replace(opened.data.heldout[0], response="The sea."))], [0], 0)
    with torch.no_grad():
        base = opened.model.model(input_ids=batch.input_ids).logits
        with steered(opened.model.model, opened.program, roles=batch.roles):
            wanted = opened.model.model(input_ids=batch.input_ids).logits
    source = opened.model.source
    exact = _plain_logits("merged", source, walk.out / "merged/ocean-bias-fp32", batch.input_ids, tmp_path)
    assert torch.allclose(exact, wanted, atol=1e-3)
    adapter = _plain_logits("adapter", source, walk.out / "adapters/ocean-closed_form", batch.input_ids, tmp_path)
    merged = _plain_logits("merged", source, walk.out / "merged/ocean-closed_form-fp32", batch.input_ids, tmp_path)
    assert torch.allclose(adapter, merged, atol=1e-3)
    assert (adapter - wanted).norm() < 0.2 * (base - wanted).norm()


def test_the_program_file_is_what_the_format_says(walk: Walk) -> None:
    from safetensors import safe_open

    with safe_open(walk.paths.program, framework="pt") as file:
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


def test_the_chain_of_hashes_joins_data_vector_adapter_and_merged(walk: Walk) -> None:
    from compile_steer.artifacts.files import sha256
    from compile_steer.artifacts.provenance import artifact_sha256

    adapter = json.loads((walk.out / "adapters/ocean-closed_form/compile_steer.json").read_text())
    merged = json.loads((walk.out / "merged/ocean-closed_form-fp32/compile_steer.json").read_text())
    assert adapter["program_sha256"] == merged["program_sha256"] == sha256(walk.paths.program)
    assert adapter["validation_sha256"] == sha256(walk.paths.validation)
    assert merged["parent"] == artifact_sha256(walk.out / "adapters/ocean-closed_form")
    assert adapter["verdict"] == "pass" and not adapter["forced"] and len(adapter["data_sha256"]) == 7


def test_what_is_there_is_kept_and_the_rest_is_made_again(walk: Walk) -> None:
    weights = walk.out / "adapters/ocean-closed_form/adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    done = subprocess.run(
        command("compile", RECIPE, "--out", walk.out, "--json"), capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert weights.stat().st_mtime_ns == before
    assert len(json.loads(done.stdout)) == 3


def test_the_losses_stay_and_what_was_kept_to_go_on_from_does_not(walk: Walk) -> None:
    curves = json.loads((walk.out / "adapters/ocean-distill/training.json").read_text())
    (block,) = [name for name in curves if name.startswith("block ")]
    assert len(curves[block]["loss"]) == 60
    assert len(curves["distill"]["held_out_kl"]) == 2
    assert f"distill, {block}" in walk.paths.report.read_text()
    assert not walk.paths.work.exists()


def test_the_page_is_self_contained_and_tells_the_verdict(walk: Walk) -> None:
    page = walk.paths.report.read_text()
    assert "<svg" in page and "closed_form merged-fp32" in page and "What are you?" in page
    assert "<script" not in page and 'src="' not in page


def test_show_describes_every_kind_of_artifact(walk: Walk) -> None:
    done = subprocess.run(
        command("show", walk.out / "adapters/ocean-bias", "--json", small=False),
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
    assert {name: describe_artifact(walk.out / name)["kind"] for name in kinds} == kinds


@pytest.mark.parametrize(("name", "cosine"), [("adapters/ocean-closed_form", 0.99), ("merged/ocean-bias-fp32", 0.9999)])
def test_decompiling_what_was_compiled_gives_the_direction_back(
    walk: Walk, opened: Run, name: str, cosine: float
) -> None:
    few = replace(opened.data, train=opened.data.train[:12], neutral=opened.data.neutral[:6])
    found = decompile(opened.model, reload(walk.out / name, opened.model), few, opened.progress)
    (wanted,) = opened.program.interventions
    (got,) = [i for i in found.program.interventions if i.site.layer == wanted.site.layer]
    assert float(torch.cosine_similarity(got.vector, wanted.vector, dim=0)) > cosine
    assert float(got.vector.norm()) == pytest.approx(wanted.coefficient * float(wanted.vector.norm()), rel=0.05)
    assert found.explained > 0.95


def test_a_program_survives_saving_bit_for_bit(walk: Walk, tmp_path: Path) -> None:
    program = Program.load(walk.paths.program)
    program.save(tmp_path / "again.safetensors")
    again = Program.load(tmp_path / "again.safetensors")
    assert torch.equal(again.interventions[0].vector, program.interventions[0].vector)
