"""A merged checkpoint is the base with the patch summed in fp32 and cast once, or nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import ArtifactError
from compile_steer.export.merged import merged_model, write_merged
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from tests.contract.test_adapters import origin, plain, product
from tests.helpers.rounding import assert_same_weights
from tests.helpers.tiny import HIDDEN, Padded, loaded, logits, random_patch, relative_error, texts

Save = Callable[[str], LoadedModel]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_merged_folder_is_summed_in_single_precision_and_cast_once(
    saved: Save, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    one = saved("gpt2")
    patch = random_patch(one, scale=0.01)
    provenance = origin(one, form=f"merged-{precision}")
    write_merged(tmp_path / "merged", patch, one, precision, provenance, "a card")
    with quiet():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = one.model.state_dict()
    for name, edit in patch.low_rank.items():
        expected = (base[f"{name}.weight"] + product(edit).T).to(dtype)
        assert found.get_parameter(f"{name}.weight").dtype == dtype
        assert torch.equal(found.get_parameter(f"{name}.weight"), expected)
    assert Provenance.read(tmp_path / "merged") == provenance
    assert (tmp_path / "merged" / "README.md").read_text(encoding="utf-8") == "a card"
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    if dtype == torch.float32:
        inputs = Padded.of(texts(), "left")
        with with_patch(one.model, patch):
            assert relative_error(logits(found, inputs), logits(one.model, inputs)) < 1e-5


def test_merging_leaves_the_base_on_disk_and_in_memory_alone(saved: Save, tmp_path: Path) -> None:
    one = saved("llama")
    inputs = Padded.of(texts(), "left")
    before = logits(one.model, inputs)
    write_merged(tmp_path / "merged", random_patch(one), one, "fp32", origin(one, form="merged-fp32"), "")
    assert torch.equal(logits(one.model, inputs), before)
    assert_same_weights(plain(one), one.model)


def test_an_edit_of_another_shape_or_module_is_not_merged(saved: Save, tmp_path: Path) -> None:
    one = saved("llama")
    name = "model.layers.1.mlp.down_proj"
    turned = LowRank(torch.ones(48, 2), torch.ones(2, HIDDEN))
    nan = LowRank(torch.full((HIDDEN, 2), 3e38), torch.full((2, 48), 3e38))
    for low_rank, message in (
        ({name: turned}, r"is \[48, 32\], the base's weight \[32, 48\]"),
        ({"model.layers.9.mlp.down_proj": turned}, r"layers\.9\.mlp\.down_proj, which the base does not have"),
        ({name: nan}, "NaN or infinity in model.layers.1.mlp.down_proj; nothing was written"),
    ):
        with pytest.raises(ArtifactError, match=message):
            write_merged(tmp_path / "merged", WeightPatch(low_rank), one, "fp32", origin(one), "")
    assert not list(tmp_path.iterdir())


def test_what_half_precision_cannot_hold_is_named_and_not_merged(saved: Save, tmp_path: Path) -> None:
    one = saved("llama")
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    patch = WeightPatch({name: LowRank(torch.full((HIDDEN, 1), 3.0), torch.full((1, 48), 65504.0)) for name in names})
    with pytest.raises(ArtifactError, match=r"beyond 65504, the largest of float16; nothing was written") as found:
        write_merged(tmp_path / "merged", patch, one, "fp16", origin(one), "")
    assert [problem.split(" ")[0] for problem in found.value.problems[:-1]] == [f"{name}.weight" for name in names]
    assert not list(tmp_path.iterdir())
    write_merged(tmp_path / "merged", patch, one, "bf16", origin(one), "")


def test_a_base_that_lacks_weights_is_not_merged(saved: Save, tmp_path: Path) -> None:
    one = saved("llama")
    weights = {name: t for name, t in one.model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    one.model.save_pretrained(tmp_path / "base", state_dict=weights)
    with pytest.raises(ArtifactError, match=r"lacks weights: model\.layers\.2\.mlp\.up_proj\.weight"):
        merged_model(str(tmp_path / "base"), random_patch(loaded("llama")))
