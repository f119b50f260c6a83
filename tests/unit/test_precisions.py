"""What a form's rounding costs, apart from the compile; and what half precision cannot hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console

from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.data.behaviour import Context
from compile_steer.export.adapter import read_patch
from compile_steer.export.engine_support import GGUF_FILE, engine_support
from compile_steer.export.gguf import write_gguf
from compile_steer.export.merged import write_merged
from compile_steer.models.logprobs import final_states
from compile_steer.models.reload import reload
from compile_steer.pipeline.artifacts import merge
from compile_steer.pipeline.run import Run
from compile_steer.report.card import model_card
from compile_steer.report.terminal import print_parities
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.tools.compare import gguf_difference
from compile_steer.tools.lineage import lineage
from compile_steer.verification.options import Form
from compile_steer.verification.precision import HALF, cost_of_rounding, edited_matrices, first_beyond, rounding_of
from tests.helpers import byte_level
from tests.helpers.tiny import FFN, HIDDEN
from tests.helpers.verification import VerifierCase, behaviour, recipe


def halves(case: VerifierCase, name: str, patch: WeightPatch) -> Path:
    folder = case.folder / name
    write_merged(folder, patch, case.base, "fp16", case.origin("merged-fp16", "bias"), "")
    return folder


def test_half_precision_is_measured_as_bf16_is(case: VerifierCase) -> None:
    (one,) = case.program.interventions
    patch = WeightPatch(bias={case.module: one.coefficient * one.vector}, config_flags=("mlp_bias",))
    folder = halves(case, "fp16", patch)
    parity = case.parity_of(folder)
    assert parity.passed and parity.form == "merged-fp16" and parity.rounding is not None
    coarse = case.reference.quantized("merged-bf16", folder)
    assert coarse is not None
    assert (
        0 < 10 * parity.rounding.kl_steered < case.reference.kl_from_steered(coarse.model, coarse.states.steered).mean
    )
    assert 0 < parity.divergence.kl.value < 10 * parity.rounding.kl_steered + 1e-6


def test_what_overflows_in_half_precision_alone_is_refused_by_its_module(case: VerifierCase) -> None:
    """Every weight fits, and fp32 computes it: only who computes in fp16 would find infinity."""
    up = "model.layers.1.mlp.up_proj"
    weight = case.base.model.get_submodule(up).weight
    large = LowRank(torch.eye(len(weight)), (60_000.0 - 1) * weight)  # the up projection 60,000 times as large
    folder = halves(case, "large", WeightPatch({up: large}))
    artifact, texts = reload(folder, case.base), case.reference.heldout
    assert bool(torch.isfinite(final_states(artifact, texts).response).all())
    assert first_beyond(artifact, texts, 1e9) is None and first_beyond(case.base, texts, HALF) is None
    with pytest.raises(ArtifactError, match=rf"the output of {up} reaches .* beyond 65504, the largest of fp16"):
        case.parity_of(folder)


# ---------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    words = byte_level.tokenizer()
    return VerifierCase.of(
        tmp_path_factory.mktemp("bytewise"), tokenizer=words, vocab_size=byte_level.VOCAB, capability=2
    )


def quantised(case: VerifierCase, precision: str, patch: WeightPatch, name: str, backend: str = "closed_form") -> Path:
    folder = case.folder / f"{name}-{precision}"
    write_gguf(folder, patch, case.base, precision, case.origin(f"gguf-{precision}", backend), "")
    return folder


def test_the_compile_is_measured_apart_from_the_quantisation(bytewise: VerifierCase) -> None:
    """An exact bias, in as few bits as there are: all that is lost is what the base loses too."""
    (one,) = bytewise.program.interventions
    shift = one.coefficient * one.vector
    patch = WeightPatch(bias={bytewise.module: shift}, config_flags=("mlp_bias",))
    parities = {
        precision: bytewise.parity_of(quantised(bytewise, precision, patch, "exact", "bias"))
        for precision in ("f16", "q4_0")
    }
    for parity in parities.values():
        assert parity.passed, parity.reasons
        assert parity.rounding is not None and parity.rounding.edited == 0 == parity.rounding.kl_edited
        assert parity.rounding.kl < 1e-9 and parity.divergence.kl.value == pytest.approx(
            parity.rounding.kl_steered, rel=1e-4
        )
        assert parity.divergence.kl_control == pytest.approx(parity.divergence.kl_control_steered, rel=1e-5)
        assert parity.capability is not None and (parity.capability.lost, parity.capability.gained) == (0, 0)
        retained = parity.behaviour.effect_retained
        assert parity.divergence.gain == pytest.approx(1.0, abs=1e-4)
        assert retained is not None and retained.value == pytest.approx(1.0, abs=1e-4)
    fine, coarse = (parities[precision].rounding for precision in ("f16", "q4_0"))
    assert fine is not None and coarse is not None and coarse.kl_base > 100 * fine.kl_base > 0
    assert parities["q4_0"].divergence.kl.value > 100 * parities["f16"].divergence.kl.value > 0
    assert json.loads(json.dumps(asdict(parities["q4_0"])))["rounding"]["kl_remaining"] < 1e-6


def test_a_compile_that_is_wrong_does_not_hide_behind_its_quantisation(bytewise: VerifierCase) -> None:
    """15 % too much of the vector: less than four bits cost, so that a sum of both would let it pass."""
    (one,) = bytewise.program.interventions
    patch = WeightPatch(bias={bytewise.module: 1.15 * one.coefficient * one.vector}, config_flags=("mlp_bias",))
    parity = bytewise.parity_of(quantised(bytewise, "q4_0", patch, "wrong", "bias"))
    assert parity.rounding is not None and parity.rounding.kl < parity.rounding.kl_steered
    assert not parity.passed
    assert any("from the hooks on the base quantised the same way; at most" in reason for reason in parity.reasons)
    assert any("the gain is 1.0" in reason for reason in parity.reasons), parity.reasons
    whole = [reason for reason in parity.reasons if reason.startswith("KL") and "quantised" not in reason]
    assert whole == [], "against full precision it is within what rounding costs"


def test_edited_matrices_may_be_rounded_anew_and_no_others(bytewise: VerifierCase) -> None:
    edits = {bytewise.module: LowRank(torch.full((HIDDEN, 1), 1e-3), torch.full((1, FFN), 1e-2))}
    folder = quantised(bytewise, "q8_0", WeightPatch(edits), "edited")
    reference = bytewise.reference
    assert rounding_of("merged-fp32", bytewise.folder, bytewise.base) is None
    quantized = reference.quantized("gguf-q8_0", folder)
    assert quantized is not None
    rounded, artifact = quantized.model, reload(folder, bytewise.base)
    edited = edited_matrices(rounded, artifact)
    assert edited == [f"{bytewise.module}.weight"]
    everything = [name for name, value in artifact.model.named_parameters() if value.ndim > 1]
    noise = reference.kl_from_steered(rounded, quantized.states.steered).mean
    assert cost_of_rounding(reference, rounded, []) == 0
    assert 0 < cost_of_rounding(reference, rounded, edited) < noise
    assert cost_of_rounding(reference, rounded, everything) == pytest.approx(noise, rel=1e-6)
    after = final_states(rounded, reference.heldout).response
    assert torch.equal(after, quantized.states.base.response), "the weights are put back"
    assert reference.quantized("gguf-q8_0", folder) is quantized, "made once for all artifacts of a form"


def test_both_figures_are_shown(bytewise: VerifierCase) -> None:
    (one,) = bytewise.program.interventions
    patch = WeightPatch(bias={bytewise.module: one.coefficient * one.vector}, config_flags=("mlp_bias",))
    parity = bytewise.parity_of(quantised(bytewise, "q8_0", patch, "shown", "bias"))
    stream = StringIO()
    print_parities(Console(file=stream, width=400), [parity])
    assert (
        str(parity.rounding) in stream.getvalue()
        and f"with it KL {parity.divergence.kl.value:.1e}" in stream.getvalue()
    )
    origin = replace(bytewise.origin("gguf-q8_0", "bias"), architecture="llama", biases=1)
    assert [engine.name for engine in engine_support(origin, Path("made"))] == ["llama.cpp", "Ollama", "transformers"]
    card = model_card(origin, Path("made"), None)
    assert "library_name: gguf" in card and "drops the biases" in card


def test_a_file_that_a_model_has_no_place_for_is_refused(bytewise: VerifierCase) -> None:
    folder = quantised(
        bytewise, "f16", WeightPatch({bytewise.module: LowRank(torch.ones(HIDDEN, 1), torch.ones(1, FFN))}), "odd"
    )
    source = gguf.GGUFReader(folder / GGUF_FILE)
    writer = gguf.GGUFWriter(folder / "odd.gguf", "llama")
    for field in source.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(field.name, field.contents(), *field.types)
    for tensor in source.tensors:
        if tensor.name != "blk.2.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.9.ffn_up.weight", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / GGUF_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"the file lacks model\.layers\.2\.mlp\.up_proj[\s\S]*no place for blk\.9"):
        reload(folder, bytewise.base)


# --------------------------------------------------------------------------------- the walk's own forms


def walk_of(case: VerifierCase, forms: list[Form], out: Path) -> Run:
    return Run(recipe(forms=forms), RunPaths(out, "tiny"), Context(case.base, behaviour()))


def test_a_gguf_form_is_merged_once_and_belongs_to_its_chain(bytewise: VerifierCase, tmp_path: Path) -> None:
    run = walk_of(bytewise, ["adapter", "gguf-q8_0", "merged-fp16"], tmp_path)
    adapter = bytewise.adapter()
    bytewise.program.save(run.paths.program)
    shutil.copytree(adapter, run.paths.adapter("closed_form"))
    folders = merge(run, [run.paths.adapter("closed_form")])
    assert [folder.name for folder in folders] == ["tiny-closed_form-gguf-q8_0", "tiny-closed_form-fp16"]
    written = (folders[0] / GGUF_FILE).stat().st_mtime_ns
    assert merge(run, [run.paths.adapter("closed_form")]) == folders
    assert (folders[0] / GGUF_FILE).stat().st_mtime_ns == written
    assert Provenance.read_unedited(folders[0]).is_merged and not Provenance.read_unedited(adapter).is_merged
    assert {link.name: link.state for link in lineage(folders[0])}["adapter"] == "intact"
    other = quantised(bytewise, "q8_0", 1.5 * read_patch(adapter), "more")
    assert gguf_difference(folders[0], folders[0]) == 0 < gguf_difference(folders[0], other) < 1


def test_a_gguf_form_that_cannot_be_is_refused_before_any_work(case: VerifierCase, tmp_path: Path) -> None:
    run = walk_of(case, ["merged-fp32", "gguf-q4_0"], tmp_path)
    case.program.save(run.paths.program)
    with pytest.raises(CannotLower, match=r"WordLevel[\s\S]*Leave the gguf forms out of verify\.forms"):
        _ = run.plan
    assert any(choice.chosen for choice in walk_of(case, ["merged-fp32"], tmp_path).plan.choices)
