"""Two processes, each with its share of the texts, come to what one process comes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common import distributed
from compile_steer.common.errors import LayoutError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch
from compile_steer.lowering import distill
from compile_steer.lowering.closed_form import Stage
from compile_steer.lowering.job import Lowering
from compile_steer.lowering.options import CompileOptions, DistillOptions
from compile_steer.pipeline.artifacts import artifacts, compile_program, verify
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from tests.helpers.fitting import canonical_program, job, random_texts, solve
from tests.helpers.processes import run_in_processes
from tests.helpers.small_run import prepare
from tests.helpers.tiny import intervention, loaded

# Sampled texts, all answers, both kinds of fit, and batches of which a process has no text.
CHANGES = [
    "compile.backends=[closed_form, distill]",
    "compile.distill.prompts=3",
    "compile.distill.start=random",  # at the closed form's optimum the first step follows rounding alone
    "compile.distill.block_steps=4",
    "compile.distill.batch_tokens=64",
    "verify.forms=[adapter]",
]


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a JSON value by their place."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in numbers(part, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for n, part in enumerate(value) for k, v in numbers(part, f"{path}/{n}").items()}
    return {path: value}


def require_equal(one: Path, two: Path) -> None:
    """All figures of two JSON files agree to rounding; hashes, times and the file's own error are each one's own."""
    first, second = (numbers(json.loads(path.read_text(encoding="utf-8"))) for path in (one, two))
    assert first.keys() == second.keys()
    for place, value in first.items():
        if "seconds" in place or "file_error" in place or "sha256" in place:
            continue
        if isinstance(value, float | int):
            assert second[place] == pytest.approx(value, rel=2e-3, abs=2e-5), place
        elif not isinstance(value, str):
            assert second[place] == value, place


def test_a_run_in_two_processes_is_that_of_one(tmp_path: Path) -> None:
    run, one, two = prepare(tmp_path), tmp_path / "one", tmp_path / "two"

    def all_stages(out: Path) -> None:
        opened = Run.open(read_recipe(run.recipe, CHANGES), out, Progress())
        opened.validate()
        compile_program(opened, force=True)
        verify(opened, artifacts(opened))

    all_stages(one)
    assert run_in_processes(2, lambda: all_stages(two)) == [0, 0]
    files = {file.relative_to(one) for file in one.rglob("*") if file.is_file()}
    assert files == {file.relative_to(two) for file in two.rglob("*") if file.is_file()}
    for file in files:
        if file.name in ("parity.json", "tide.validation.json", "training.json"):
            require_equal(one / file, two / file)
    directions, same = (load_file(out / "vectors" / "tide.directions.safetensors") for out in (one, two))
    for name, tensor in directions.items():
        assert torch.allclose(same[name], tensor, rtol=1e-4, atol=1e-5), name
    for backend in ("closed_form", "distill"):
        edits, same_edits = (read_patch(RunPaths(out, "tide").adapter(backend)).low_rank for out in (one, two))
        assert edits.keys() == same_edits.keys()
        for name, edit in edits.items():  # the product: the two factors may turn together
            delta = edit.B @ edit.A
            assert torch.allclose(
                same_edits[name].B @ same_edits[name].A, delta, atol=4e-3 * float(delta.abs().max())
            ), name


def test_a_pair_of_neurons_is_fitted_to_the_texts_of_both_processes() -> None:
    changes = intervention("ablate"), intervention(positions="response")
    programs = [canonical_program("llama", change) for change in changes]
    alone = [solve(loaded("llama"), program, [Stage(1, "both", 1)]) for program in programs]

    def in_two() -> None:
        for program, patch in zip(programs, alone, strict=True):
            same = solve(loaded("llama"), program, [Stage(1, "both", 1)]).low_rank
            assert same.keys() == patch.low_rank.keys() > {"model.layers.1.mlp.gate_proj"}
            for name, edit in patch.low_rank.items():
                delta = edit.B @ edit.A
                assert torch.dist(same[name].B @ same[name].A, delta) < 1e-3 * delta.norm(), name

    assert run_in_processes(2, in_two) == [0, 0]


def test_a_base_laid_over_two_processes_trains_as_one_does() -> None:
    def lowering(**options: Any) -> Lowering:
        distill_options = DistillOptions(rank=2, start="random", batch_tokens=128, **options)
        made = job(loaded("llama"), canonical_program("llama", intervention()), CompileOptions(distill=distill_options))
        made.__dict__["training_texts"] = random_texts(17, 3)
        return made

    alone = lowering()
    distill.lower(alone)

    def in_two() -> None:
        sharded = lowering(shard=True)
        distill.lower(sharded)
        parts: list[Any] = list(sharded.loaded.layout.blocks[0].parameters())
        assert sum(part.to_local().numel() for part in parts) * 2 == sum(part.numel() for part in parts)
        for kind, values in alone.curves["distill"].items():
            assert sharded.curves["distill"][kind] == pytest.approx(values, rel=1e-5)

    assert run_in_processes(2, in_two) == [0, 0]
    with pytest.raises(
        RecipeError, match="compile.distill.shard lays the base over several processes, and there is one"
    ):
        distill.lower(lowering(shard=True))


def test_what_rank_0_raises_is_raised_in_all_and_a_process_that_ends_is_named() -> None:
    def raise_in_all() -> None:
        def fail() -> None:
            raise LayoutError("not this one")

        with pytest.raises(LayoutError, match="not this one"):
            distributed.first(fail)
        assert distributed.spread([3, 5, 7], lambda own: [x * x for x in own]) == [9, 25, 49]
        assert distributed.spread([3], lambda own: [x + distributed.rank() for x in own]) == [3]
        if distributed.rank() == 1:
            raise SystemExit(5)
        with pytest.raises(RecipeError, match="has lost the others"):
            distributed.gather(1)

    assert run_in_processes(2, raise_in_all) == [0, 5]


def test_what_one_process_alone_can_do_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.require_alone("decompilation")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="decompilation runs in one process; start it without torchrun"):
        distributed.require_alone("decompilation")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RecipeError, match="LOCAL_RANK is not set: use torchrun"):
        distributed.join()
