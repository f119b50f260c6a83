"""A patch on disk is a stock PEFT folder: plain PEFT, merged weights and hooks compute the same thing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compile_steer.artifacts.provenance import PROVENANCE, Provenance
from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.export.adapter import PATCH_FILE, read_patch, write_patch
from compile_steer.export.merged import merged_model
from compile_steer.formats.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from compile_steer.models.fingerprint import REFERENCE_TEXTS
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.report.card import model_card
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from tests.helpers.rounding import assert_close_to_rounding
from tests.helpers.tiny import FAMILIES, HIDDEN, Padded, logits, random_patch, relative_error, texts, vector

Save = Callable[[str], LoadedModel]


def origin(one: LoadedModel, form: str = "adapter", backend: str = "closed_form") -> Provenance:
    return Provenance(
        name="tiny",
        backend=backend,
        form=form,
        model=one.id,
        revision=one.revision,
        program="vectors/tiny.safetensors",
        program_sha256="a1",
        validation_sha256="b2",
        verdict="inconclusive",
        forced=True,
        recipe_sha256="c3",
        data_sha256={"train": "d4"},
        seed=7,
        seconds=1.5,
        inputs="e5",
    )


def write(folder: Path, patch: WeightPatch, one: LoadedModel) -> Path:
    found = replace(origin(one), described="add +1.7 at resid_post 1\nablate +1 at mlp_out 2")
    write_patch(folder, patch, one, found, model_card(found, folder, None))
    return folder


def plain(one: LoadedModel) -> torch.nn.Module:
    """The base as a user's plain transformers loads it from disk."""
    with quiet():
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32).eval()
    return model


def product(edit: LowRank) -> torch.Tensor:
    return edit.B @ edit.A


# ------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_merged_weights_and_hooks_agree(family: str, saved: Save, tmp_path: Path) -> None:
    one = saved(family)
    patch = random_patch(one)
    write(tmp_path / "adapter", patch, one)
    with quiet():
        adapted = PeftModel.from_pretrained(plain(one), str(tmp_path / "adapter")).eval()
    merged = merged_model(one.source, patch).eval()
    for side in ("left", "right"):
        inputs = Padded.of(texts(), side)
        base = logits(one.model, inputs)
        with with_patch(one.model, patch):
            expected = logits(one.model, inputs)
        assert relative_error(expected, base) > 1e-2
        assert relative_error(logits(adapted, inputs), expected) < 1e-5
        assert relative_error(logits(merged, inputs), expected) < 1e-5
        with adapted.disable_adapter():
            assert_close_to_rounding(logits(adapted, inputs), base)
    by_peft = adapted.merge_and_unload(safe_merge=True)
    assert relative_error(logits(by_peft, inputs), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_comes_back_from_its_folder(family: str, saved: Save, tmp_path: Path) -> None:
    one = saved(family)
    patch = random_patch(one)
    found = read_patch(write(tmp_path / "adapter", patch, one))
    assert set(found.low_rank) == set(patch.low_rank)
    assert not found.bias
    for name, edit in found.low_rank.items():
        expected = patch.low_rank[name]
        assert edit.rank == 8, "ranks 2 and 3 share the next rank that engines take"
        assert torch.equal(edit.B[:, : expected.rank], expected.B)
        assert torch.equal(edit.A[: expected.rank], expected.A)
        assert torch.allclose(product(edit), product(expected))


# ------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(("ranks", "written"), [((1,), 1), ((1, 2), 8), ((8,), 8), ((9,), 16)])
def test_adapters_are_plain_lora_of_one_rank_with_the_scale_baked_in(
    saved: Save, tmp_path: Path, ranks: tuple[int, ...], written: int
) -> None:
    folder = write(tmp_path / "adapter", random_patch(saved("llama"), ranks=ranks), saved("llama"))
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (written, written)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"]) == (saved("llama").source, False)
    for rich in ("use_rslora", "use_dora", "lora_bias", "alpha_pattern", "rank_pattern", "modules_to_save"):
        assert not config[rich]
    tensors, _metadata = read_tensors(folder / ADAPTER_WEIGHTS)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {written}
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_a_folder_holds_its_origin_and_a_card_and_nothing_else(saved: Save, tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", random_patch(saved("gpt2")), saved("gpt2"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROVENANCE, "README.md"]
    )
    found = Provenance.read(folder)
    assert replace(found, described="", fingerprint=[]) == origin(saved("gpt2")) and len(found.fingerprint) == len(
        REFERENCE_TEXTS
    )
    assert json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["fan_in_fan_out"] is True
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "    add +1.7 at resid_post 1\n    ablate +1 at mlp_out 2\n" in card
    assert "inconclusive, **compiled with --force in spite of it**" in card
    assert "PeftModel.from_pretrained" in card


def test_biases_are_kept_with_their_config_flags(saved: Save, tmp_path: Path) -> None:
    patch = WeightPatch(
        bias={"model.layers.1.mlp.down_proj": vector(1), "model.layers.2.self_attn.o_proj": vector(2)},
        config_flags=("attention_bias", "mlp_bias"),
    )
    folder = write(tmp_path / "bias", patch, saved("llama"))
    assert not (folder / ADAPTER_WEIGHTS).exists()
    found = read_patch(folder)
    assert found.config_flags == patch.config_flags
    assert set(found.bias) == set(patch.bias)
    assert all(torch.equal(found.bias[name], patch.bias[name]) for name in patch.bias)
    assert not found.low_rank


def test_what_is_not_finite_is_not_written_over_what_is(saved: Save, tmp_path: Path) -> None:
    patch = random_patch(saved("llama"))
    folder = write(tmp_path / "adapter", patch, saved("llama"))
    name = sorted(patch.low_rank)[0]
    bad = LowRank(patch.low_rank[name].B * math.nan, patch.low_rank[name].A)
    with pytest.raises(ArtifactError, match=f"{name} are not finite"):
        write(folder, replace(patch, low_rank={**patch.low_rank, name: bad}), saved("llama"))
    assert torch.allclose(product(read_patch(folder).low_rank[name]), product(patch.low_rank[name]))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ------------------------------------------------------------------------------------ foreign folders


def adapter_of(folder: Path, one: LoadedModel) -> Path:
    return write(
        folder, WeightPatch({"model.layers.1.mlp.down_proj": LowRank(torch.ones(HIDDEN, 2), torch.ones(2, 48))}), one
    )


def test_the_scale_of_an_adapter_is_read_into_its_factors(saved: Save, tmp_path: Path) -> None:
    path = adapter_of(tmp_path / "adapter", saved("llama")) / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "lora_alpha": 32}), encoding="utf-8")
    (edit,) = read_patch(tmp_path / "adapter").low_rank.values()
    assert torch.equal(product(edit), 32 / 8 * torch.full((HIDDEN, 48), 2.0))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is damaged"), ('{"r": null}', "is something else .r: found None")]
)
def test_an_adapter_without_a_usable_config_is_refused(saved: Save, tmp_path: Path, content: str, message: str) -> None:
    path = adapter_of(tmp_path / "adapter", saved("llama")) / ADAPTER_CONFIG
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_patch(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["half a pair", "other tensors", "no tensors", "truncated", "gone"])
def test_damaged_adapter_weights_are_refused(saved: Save, tmp_path: Path, damage: str) -> None:
    path = adapter_of(tmp_path / "adapter", saved("llama")) / ADAPTER_WEIGHTS
    tensors, _metadata = read_tensors(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert set(tensors) == {name.format("A"), name.format("B")}
    if damage == "half a pair":
        save_file({name.format("A"): tensors[name.format("A")]}, str(path))
    elif damage == "other tensors":
        save_file({**tensors, "lm_head.weight": torch.ones(2)}, str(path))
    elif damage == "no tensors":
        save_file({}, str(path))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match="adapter"):
        read_patch(tmp_path / "adapter")


def test_a_foreign_patch_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, str(tmp_path / PATCH_FILE))
    with pytest.raises(ArtifactError, match="no 'patch' in its metadata"):
        read_patch(tmp_path)


def test_an_origin_that_is_missing_or_damaged_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere does not exist\. Make it with"):
        Provenance.read(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="it was not made by compile_steer"):
        Provenance.read(tmp_path)
    for text in ("{", "[]", '{"name": "tiny"}', '{"unknown": 1}'):
        (tmp_path / PROVENANCE).write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError, match="is damaged|is not a record of an artifact of this version"):
            Provenance.read(tmp_path)
