"""Memory is planned from config.json before anything is loaded; what cannot fit is refused, with what would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.pipeline import memory, run
from compile_steer.pipeline.memory import LIBRARIES, ModelSize, plan_memory
from compile_steer.recipe import Recipe, read_recipe
from tests.helpers.small_run import prepare
from tests.helpers.tiny import saved


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_oss"])
def test_the_size_of_a_model_is_read_without_its_weights(family: str, tmp_path: Path) -> None:
    tiny = saved(family, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    size = ModelSize.of(tmp_path, torch.float16)
    assert size.weights == 2 * sum(parameter.numel() for parameter in tiny.model.parameters())
    assert (size.blocks, size.d_model, size.vocabulary) == (4, 32, 97)


def test_a_stage_that_cannot_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_load(_recipe: Recipe) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(run, "load_base", no_load)
    recipe = read_recipe(prepare(tmp_path).recipe)
    data = recipe.data.read(recipe.folder)
    size = ModelSize.of(tmp_path / "model", torch.float32)
    plan = plan_memory(size, recipe, data)
    assert {"extraction", "validation", "writing texts", "closed_form", "verification"} == plan.keys()
    # The verifier runs beside a process that holds the base and libraries of its own.
    most = max(plan.values())
    beside = plan["verification"] + size.weights + 2 * LIBRARIES
    assert memory.peak_memory(tmp_path / "model", recipe, data) == max(beside, most + LIBRARIES)
    # Room for half of what the largest stage takes: its numbers in half as many bytes fit.
    monkeypatch.setattr(memory, "LIBRARIES", 0.0)
    monkeypatch.setattr(memory, "free_memory", lambda _device: 0.9 * most)
    with pytest.raises(
        RecipeError, match=r"memory: \w+ needs about .* GiB, of which weights .* cpu has .* free"
    ) as refused:
        run.Run.open(recipe, tmp_path / "out", Progress())
    assert refused.value.problems[1:] == ("dtype: bfloat16 would fit.",)
    monkeypatch.setattr(memory, "free_memory", lambda _device: 0.0)
    with pytest.raises(RecipeError, match="Needed: a device with more memory, a smaller model"):
        run.Run.open(recipe, tmp_path / "out", Progress())
    monkeypatch.setattr(memory, "free_memory", lambda _device: None)  # not known: nothing is refused
    with pytest.raises(AssertionError, match="nothing may be loaded"):
        run.Run.open(recipe, tmp_path / "out", Progress())


def test_a_family_with_other_words_for_its_sizes_has_no_peak(tmp_path: Path) -> None:
    recipe = read_recipe(prepare(tmp_path).recipe)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    assert memory.peak_memory(tmp_path / "model", recipe, recipe.data.read(recipe.folder)) is None


def test_more_of_anything_takes_no_less_memory() -> None:
    size = ModelSize(10**8, 12, 512, 1376, 512, 256, 32_000, 4)
    assert LIBRARIES < 2**30
    assert size.extraction(100) < size.extraction(1000) == size.extraction(4096) * 1000 / 4096
    assert size.extraction(9000) == size.extraction(4096)
    assert size.generation(8, 50) < size.generation(16, 50) < size.generation(16, 90)
    assert size.closed_form(100) < size.closed_form(10**6)
    assert size.distillation(100, 512, 1, 8) < size.distillation(100, 512, 2, 8) < size.distillation(100, 512, 0, 8)
    assert size.verification(10) >= size.weights
