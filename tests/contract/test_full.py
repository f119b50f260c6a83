"""Whole weights trained on tiny models: what they learn, which change, and what a cut of them keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from compile_steer.common.errors import ArtifactError, CannotLower
from compile_steer.common.progress import Advance, Progress
from compile_steer.export.adapter import is_adapter, read_patch
from compile_steer.export.merged import merged_model
from compile_steer.lowering import full
from compile_steer.lowering.job import Lowering, ResumeFiles
from compile_steer.lowering.options import CompileOptions, FullOptions
from compile_steer.lowering.plan import BACKENDS
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.steering.hooks import steered
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from tests.contract.test_adapters import plain, write
from tests.helpers.captures import n_hooks
from tests.helpers.fitting import CALIBRATION, FAMILIES, HELD_OUT, TRAINING, canonical_program, job, remaining_kl
from tests.helpers.tiny import Padded, intervention, loaded, logits, relative_error

Save = Callable[[str], LoadedModel]
OPTIONS = FullOptions(optimizer="adamw", batch_tokens=256, epochs=6, learning_rate=0.02, cut_rank=4)
APOLLO = OPTIONS.model_copy(update={"optimizer": "apollo", "apollo_rank": 4})


def task(tiny: LoadedModel, steering: Program, options: FullOptions = OPTIONS) -> Lowering:
    lowering = job(tiny, steering, CompileOptions(full=options))
    lowering.__dict__.update(regression_texts=CALIBRATION, training_texts=TRAINING)
    return lowering


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [OPTIONS, APOLLO], ids=["adamw", "apollo"])
def test_training_lowers_the_divergence_on_texts_it_never_saw(family: str, options: FullOptions) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention())
    batch, hooks = Padded.of(HELD_OUT, "right"), n_hooks(tiny.model)
    base = logits(tiny.model, batch)
    patch = full.lower(task(tiny, steering, options))
    assert set(patch.dense) == {name for block in (1, 2, 3) for name in tiny.layout.linears(block)}
    assert not patch.low_rank
    for name, delta in patch.dense.items():
        assert delta.shape == tiny.model.get_parameter(f"{name}.weight").shape
        assert bool(delta.any()), f"{name} was trained"
    assert remaining_kl(tiny, steering, patch) < 0.5
    assert n_hooks(tiny.model) == hooks
    assert torch.equal(logits(tiny.model, batch), base)
    assert not any(parameter.grad is not None for parameter in tiny.model.parameters())


class Stopped(Exception):
    """What a kill is to a test."""


class StopsAfter(Progress):
    """Raises `Stopped` once so many texts were seen."""

    def __init__(self, texts: float) -> None:
        self.left = texts

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:
        def advance(done: float) -> None:
            self.left -= done
            if self.left < 0:
                raise Stopped

        yield advance


@pytest.mark.parametrize("options", [OPTIONS, APOLLO], ids=["adamw", "apollo"])
def test_a_stopped_training_resumes_and_ends_in_the_same_weights(options: FullOptions, tmp_path: Path) -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    short = options.model_copy(update={"epochs": 2, "save_every": 3})
    expected = full.lower(task(tiny, steering, short))

    def resumable(progress: Progress) -> Lowering:
        lowering = replace(task(tiny, steering, short), resume=ResumeFiles(tmp_path, "x"), progress=progress)
        lowering.__dict__.update(regression_texts=CALIBRATION, training_texts=TRAINING)
        return lowering

    with pytest.raises(Stopped):
        full.lower(resumable(StopsAfter(1.4 * len(CALIBRATION + TRAINING))))
    resumed = full.lower(resumable(Progress()))
    assert all(torch.equal(resumed.dense[name], delta) for name, delta in expected.dense.items()), "bit by bit"


def test_apollo_mini_learns_too_and_the_same_seed_gives_the_same_weights() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    options = APOLLO.model_copy(update={"apollo_rank": 1})
    first, second = (full.lower(task(tiny, steering, options)) for _ in range(2))
    assert remaining_kl(tiny, steering, first) < 0.6
    assert all(torch.equal(first.dense[name], second.dense[name]) for name in first.dense)


@pytest.mark.parametrize(("family", "ending"), [("llama", "mlp.down_proj"), ("gpt2", "2.mlp.c_proj")])
def test_only_the_chosen_modules_change(family: str, ending: str) -> None:
    tiny, steering = loaded(family), canonical_program(family, intervention())
    options = OPTIONS.model_copy(update={"modules": (ending,), "epochs": 1.0})
    patch = full.lower(task(tiny, steering, options))
    assert set(patch.dense) == {
        name for block in (1, 2, 3) for name in tiny.layout.linears(block) if name.endswith(f".{ending}")
    }


def test_endings_that_no_module_has_are_named_with_those_there_are() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    options = OPTIONS.model_copy(update={"modules": ("down_proj", "own_proj", "0.mlp.down_proj", "lm_head")})
    with pytest.raises(
        CannotLower, match=r"ends in own_proj, 0.mlp.down_proj, lm_head. A block has: self_attn.q_proj, "
    ):
        full.lower(job(tiny, steering, CompileOptions(full=options)))


def test_training_that_learns_nothing_ships_nothing() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    with pytest.raises(CannotLower, match=r"where the base itself has .*learning_rate \(50\)"):
        full.lower(task(tiny, steering, OPTIONS.model_copy(update={"learning_rate": 50.0, "epochs": 1.0})))


@pytest.mark.parametrize("family", FAMILIES)
def test_file_merged_weights_and_hooks_agree_and_so_does_the_cut(family: str, saved: Save, tmp_path: Path) -> None:
    tiny, steering = saved(family), canonical_program(family, intervention())
    ready = task(tiny, steering, OPTIONS.model_copy(update={"epochs": 2.0}))
    patch = ready.patches["full"] = full.lower(ready)
    assert not is_adapter(patch, tiny)
    reread = read_patch(write(tmp_path / "full", patch, tiny))
    assert all(torch.equal(reread.dense[name], delta) for name, delta in patch.dense.items())
    small = full.lower_cut(ready)
    assert is_adapter(small, tiny)
    assert {edit.rank for edit in small.low_rank.values()} == {4}
    with quiet():
        adapted = PeftModel.from_pretrained(plain(tiny), str(write(tmp_path / "cut", small, tiny))).eval()
    for side in ("left", "right"):
        inputs = Padded.of(HELD_OUT, side)
        base = logits(tiny.model, inputs)
        for edit, model in ((patch, merged_model(tiny.source, reread)), (small, adapted)):
            with with_patch(tiny.model, edit):
                expected = logits(tiny.model, inputs)
            assert relative_error(logits(model.eval(), inputs), expected) < 1e-5
            assert relative_error(expected, base) > 1e-2
    assert 0.0 < remaining_kl(tiny, steering, patch) < 1.0
    assert remaining_kl(tiny, steering, small) < 1.0


def test_a_cut_trains_only_where_the_whole_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    ready = task(tiny, steering)
    ready.patches["full"] = WeightPatch(dense={"model.layers.1.mlp.down_proj": torch.randn(32, 48)})
    monkeypatch.setattr("compile_steer.lowering.full.train", lambda *_: pytest.fail("trained again"))
    assert list(BACKENDS["full_cut"].lower(ready).low_rank) == ["model.layers.1.mlp.down_proj"]


def test_a_cut_above_the_matrices_is_refused_before_any_training() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    with pytest.raises(CannotLower, match=r"compile.full.cut_rank 33 is above what model\.layers\.1\."):
        full.lower_cut(task(tiny, steering, OPTIONS.model_copy(update={"cut_rank": 33})))


def test_whole_changes_that_are_not_finite_or_do_not_fit_are_refused(saved: Save, tmp_path: Path) -> None:
    tiny, name = saved("llama"), "model.layers.1.mlp.down_proj"
    broken = torch.zeros(32, 48)
    broken[3, 4] = torch.nan
    with pytest.raises(ArtifactError, match=f"{name} are not finite"):
        write(tmp_path / "broken", WeightPatch(dense={name: broken}), tiny)
    with pytest.raises(ArtifactError, match=r"down_proj is \[48, 32\], the base's weight \[32, 48\]"):
        merged_model(tiny.source, WeightPatch(dense={name: torch.ones(48, 32)}))


def test_a_whole_change_of_the_embeddings_is_looked_up() -> None:
    tiny = loaded("llama")
    delta = torch.randn(97, 32, generator=torch.Generator().manual_seed(3))
    batch = Padded.of(HELD_OUT, "right")
    with with_patch(tiny.model, WeightPatch(dense={"model.embed_tokens": delta})):
        actual = tiny.model.get_input_embeddings()(batch.input_ids)
    expected = torch.nn.functional.embedding(batch.input_ids, tiny.model.get_input_embeddings().weight + delta)
    assert torch.allclose(actual, expected, atol=1e-6)


# ---------------------------------------------------------------------- editing W_q is not adding the vector


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_no_edit_of_the_queries_moves_the_first_token_which_the_vector_does(family: str) -> None:
    """One token has one key to look at: whatever its queries are, the attention's weights are 1."""
    tiny, steering = loaded(family), canonical_program(family, intervention())
    queries = {
        name: torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(n))
        for n, (name, module) in enumerate(tiny.model.named_modules())
        if name.endswith("self_attn.q_proj") and isinstance(module, torch.nn.Linear)
    }
    assert len(queries) == 4
    batch = Padded.of(HELD_OUT, "right")
    starts = [0, *torch.tensor([len(row.ids) for row in HELD_OUT]).cumsum(0).tolist()[:-1]]
    base = logits(tiny.model, batch)
    with with_patch(tiny.model, WeightPatch(dense=queries)):
        actual = logits(tiny.model, batch)
    with steered(tiny.model, steering, roles=batch.roles):
        expected = logits(tiny.model, batch)
    assert relative_error(actual[starts], base[starts]) < 1e-5
    assert relative_error(actual, base) > 1e-1
    assert relative_error(expected[starts], base[starts]) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_training_the_queries_alone_leaves_most_and_the_output_projections_little(family: str) -> None:
    """At the queries' own best of three rates (0.02, 0.06, 0.15) and 15 epochs: 0.55 to 0.70 left, of down_proj's 0.03 to 0.16."""
    tiny, steering = loaded(family), canonical_program(family, intervention())
    left = {}
    for ending in ("self_attn.q_proj", "mlp.down_proj"):
        options = OPTIONS.model_copy(update={"modules": (ending,), "learning_rate": 0.06})
        left[ending] = remaining_kl(tiny, steering, full.lower(task(tiny, steering, options)))
    assert left["self_attn.q_proj"] > 0.5
    assert left["mlp.down_proj"] < 0.3


def test_a_negated_task_vector_moves_the_other_way() -> None:
    tiny, steering = loaded("llama"), canonical_program("llama", intervention())
    patch = full.lower(task(tiny, steering))
    assert remaining_kl(tiny, steering, -1.0 * patch) > 1.5
    half = remaining_kl(tiny, steering, 0.5 * patch)
    assert remaining_kl(tiny, steering, patch) < half < 1.0
