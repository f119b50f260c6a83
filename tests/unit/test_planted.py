"""Each planted fault changes what its name says and nothing else; and the verifier fails those in a checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.faults import FAULTS
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import ArtifactError
from compile_steer.steering.hooks import steered
from compile_steer.verification.stage import verify_artifact
from tests.helpers import planted
from tests.helpers.planted import Fault, weights_file
from tests.helpers.verification import PROGRAM_HASH, VerifierCase, make_reference

FIRST, SECOND = "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"
# What no checkpoint shows by itself: the untouched one, and faults of the verifier itself.
SEEN = [one for one in FAULTS if one.form == "merged-fp32" and one.name != "none" and one.verifier == "sound"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    made = VerifierCase.of(tmp_path_factory.mktemp("case"), prompts_per_set=2, long=1, long_tokens=40, free_tokens=4)
    # The sound ones are measured first: no fault may pass for one that computes the same.
    for folder in (made.adapter(), made.merged()):
        made.parity_of(folder)
    return made


def spoiled(case: VerifierCase, plant: planted.Plant, form: str, folder: Path) -> Path:
    shutil.copytree(case.folder / ("adapter" if form == "adapter" else "merged"), folder)
    planted.plant(plant, folder, Path(case.base.source))
    return folder


def effect(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each module's weight, as PEFT scales it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name for name in config["target_modules"] if f"base_model.model.{name}.lora_A.weight" in tensors]
    keys = {name: [f"base_model.model.{name}.lora_{side}.weight" for side in "BA"] for name in names}
    return {name: scale * tensors[b].float() @ tensors[a].float() for name, (b, a) in keys.items()}


@pytest.mark.parametrize(
    ("plant", "factor"),
    [
        (planted.scaled(-1.0), -1.0),
        (planted.scaled(1.1), 1.1),
        (planted.scaled(0.0), 0.0),
        (planted.configured(lora_alpha=lambda old: 2 * old), 2.0),
        (planted.configured(use_rslora=True), 8**0.5),
    ],
)
def test_a_factor_is_on_every_module(case: VerifierCase, tmp_path: Path, plant: planted.Plant, factor: float) -> None:
    before, after = effect(case.folder / "adapter"), effect(spoiled(case, plant, "adapter", tmp_path / "it"))
    assert before.keys() == after.keys() == {FIRST, SECOND}
    for name in before:
        torch.testing.assert_close(after[name], factor * before[name])


@pytest.mark.parametrize("blocks", [1, -1])
def test_a_moved_adapter_is_for_the_neighbours(case: VerifierCase, tmp_path: Path, blocks: int) -> None:
    before = effect(case.folder / "adapter")
    after = effect(spoiled(case, planted.moved(blocks), "adapter", tmp_path / "it"))
    assert torch.equal(after[f"model.layers.{1 + blocks}.mlp.down_proj"], before[FIRST])
    assert torch.equal(after[f"model.layers.{2 + blocks}.self_attn.o_proj"], before[SECOND])


def test_a_rank_is_cut_and_cannot_be_cut_again(case: VerifierCase, tmp_path: Path) -> None:
    before, folder = effect(case.folder / "adapter"), spoiled(case, planted.rank_cut, "adapter", tmp_path / "it")
    for name, now in effect(folder).items():
        assert torch.linalg.matrix_rank(now) == 1 and not torch.allclose(now, before[name])
    with pytest.raises(ValueError, match="rank 1; needed: more"):
        planted.rank_cut(folder, folder)


@pytest.mark.parametrize("plant", [planted.largest_zeroed, planted.largest_missing])
def test_only_the_largest_change_is_lost(case: VerifierCase, tmp_path: Path, plant: planted.Plant) -> None:
    before, after = effect(case.folder / "adapter"), effect(spoiled(case, plant, "adapter", tmp_path / "it"))
    largest, other = sorted(before, key=lambda name: -float(before[name].norm()))
    assert torch.equal(after[other], before[other])
    assert largest not in after or not after[largest].any()


def test_half_precision_overflows(case: VerifierCase, tmp_path: Path) -> None:
    folder = spoiled(case, planted.overflown, "adapter", tmp_path / "it")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(one.dtype == torch.float16 for one in tensors.values())
    assert all(bool(one.isinf().any()) == ("lora_A" in name) for name, one in tensors.items())
    with pytest.raises(ArtifactError, match="NaN or infinity"):
        case.parity_of(folder)


def test_another_model_s_adapter_has_the_same_norms(case: VerifierCase, tmp_path: Path) -> None:
    before = effect(case.folder / "adapter")
    for name, now in effect(spoiled(case, planted.of_another_model, "adapter", tmp_path / "it")).items():
        assert float(now.norm()) == pytest.approx(float(before[name].norm()), rel=1e-5)
        assert not torch.allclose(now, before[name], atol=0.1)


@pytest.mark.parametrize("factor", [-1.0, 0.0, 0.9, 2.0])
def test_what_was_merged_is_there_so_many_times(case: VerifierCase, tmp_path: Path, factor: float) -> None:
    folder = spoiled(case, planted.times_merged(factor), "merged", tmp_path / "it")
    base, once, now = (load_file(weights_file(one)) for one in (Path(case.base.source), case.folder / "merged", folder))
    bias = f"{FIRST}.bias"
    assert bool(once[bias].any())
    torch.testing.assert_close(now[bias], factor * once[bias])
    assert all(torch.equal(now[name], one) for name, one in base.items())


def test_what_was_merged_is_a_block_further_on(case: VerifierCase, tmp_path: Path) -> None:
    once = load_file(weights_file(case.folder / "merged"))
    now = load_file(weights_file(spoiled(case, planted.merged_elsewhere(1), "merged", tmp_path / "it")))
    assert not now[f"{FIRST}.bias"].any()
    assert torch.equal(now["model.layers.2.mlp.down_proj.bias"], once[f"{FIRST}.bias"])


def test_another_revision_is_one_percent_off(case: VerifierCase, tmp_path: Path) -> None:
    once = load_file(weights_file(case.folder / "merged"))
    now = load_file(weights_file(spoiled(case, planted.of_another_revision, "merged", tmp_path / "it")))
    for name, one in once.items():
        expected = 0.01 if one.ndim == 2 else 0.0
        assert float((now[name] - one).norm()) == pytest.approx(expected * float(one.norm()), rel=1e-3)


def test_a_tokenizer_has_other_numbers_for_the_same_words(case: VerifierCase, tmp_path: Path) -> None:
    folder = spoiled(case, planted.other_tokenizer, "merged", tmp_path / "it")
    before, after = (AutoTokenizer.from_pretrained(one) for one in (case.folder / "merged", folder))
    assert before("w9 w20")["input_ids"] != after("w9 w20")["input_ids"]
    assert len(before) == len(after) and before.eos_token_id == after.eos_token_id


def test_a_template_is_another(case: VerifierCase, tmp_path: Path) -> None:
    folder = spoiled(case, planted.other_template, "merged", tmp_path / "it")
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("{% for m in messages %}###")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError):
        planted.other_template(folder, folder)


def test_configs_are_changed(case: VerifierCase, tmp_path: Path) -> None:
    once = json.loads((case.folder / "merged" / "config.json").read_text())
    off = json.loads((spoiled(case, planted.biases_off, "merged", tmp_path / "off") / "config.json").read_text())
    assert off == {**once, "mlp_bias": False} and once["mlp_bias"] is True
    turned = json.loads((spoiled(case, planted.other_rotation, "merged", tmp_path / "it") / "config.json").read_text())
    assert turned["rope_parameters"]["rope_theta"] == 4 * once["rope_parameters"]["rope_theta"]


def test_an_origin_is_claimed_and_a_file_is_cut_short(case: VerifierCase, tmp_path: Path) -> None:
    folder = spoiled(case, planted.claims(revision="sha256:other"), "adapter", tmp_path / "claims")
    assert Provenance.read(folder) == replace(Provenance.read(case.folder / "adapter"), revision="sha256:other")
    short = spoiled(case, planted.truncated, "adapter", tmp_path / "short")
    with pytest.raises(SafetensorError):
        load_file(weights_file(short))
    (short / "more.safetensors").touch()
    with pytest.raises(ValueError, match="2 files of weights"):
        weights_file(short)


@pytest.mark.parametrize("fault", SEEN, ids=lambda one: one.name)
def test_the_verifier_fails_it(case: VerifierCase, tmp_path: Path, fault: Fault) -> None:
    folder = spoiled(case, fault.plant, "merged", tmp_path / "it")
    try:
        assert case.parity_of(folder).reasons
    except ArtifactError as error:
        assert error.problems


IN_ADAPTERS = [one for one in FAULTS if one.form == "adapter" and one.name != "none" and one.verifier == "sound"]


@pytest.mark.parametrize("fault", IN_ADAPTERS, ids=lambda one: one.name)
def test_an_adapter_with_a_fault_takes_nothing_over_from_the_sound_one(
    case: VerifierCase, tmp_path: Path, fault: Fault
) -> None:
    folder = spoiled(case, fault.plant, "adapter", tmp_path / "it")
    try:
        assert "adapter" not in case.parity_of(folder).inherited
    except ArtifactError as error:
        assert error.problems


def test_the_verifier_passes_the_untouched(case: VerifierCase, tmp_path: Path) -> None:
    assert case.parity_of(spoiled(case, planted.untouched, "merged", tmp_path / "it")).reasons == []


def test_a_program_of_other_positions_fails(case: VerifierCase) -> None:
    only = replace(case.program, interventions=(replace(case.program.interventions[0], positions="response"),))
    other = make_reference(case.base, only, **case.verify)
    assert verify_artifact(other, case.folder / "merged", PROGRAM_HASH).reasons


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_hook_that_was_left_on_fails(case: VerifierCase, form: str) -> None:
    with steered(case.base.model, case.program):
        other = make_reference(case.base, case.program, **case.verify)
        parity = verify_artifact(other, case.folder / form, PROGRAM_HASH)
    assert any("adapter at scale 0" in reason for reason in parity.reasons) or form == "merged"
    assert parity.reasons
