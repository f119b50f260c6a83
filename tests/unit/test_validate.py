"""The validation stage on tiny models: what is measured, what is controlled, and what the verdict hangs on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.pipeline.run import other_behaviour
from compile_steer.recipe import Recipe
from compile_steer.scoring.answers import Request, answer
from compile_steer.stats import Interval
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.program import Program
from compile_steer.steering.sites import Point
from compile_steer.validate.controls import Stream, measure_controls
from compile_steer.validate.evaluator import Bench
from compile_steer.validate.report import ValidationReport, block_name
from compile_steer.validate.search import climb, solve
from compile_steer.validate.stage import validate
from compile_steer.validate.sweep import candidates, measure_layers, search_layers
from compile_steer.validate.verdict import judge, remarks
from tests.helpers.tiny import HIDDEN, LAYERS, REVISION, build, chat_tokenizer

SPLITS = ("train", "validation", "test", "neutral", "heldout", "calibration")


@cache
def chatty() -> LoadedModel:
    return LoadedModel(build("qwen2", 5), chat_tokenizer(), "tiny-qwen2", REVISION, "")


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


def pairs(start: int, count: int) -> tuple[Pair, ...]:
    """Positives hold w40, which the score looks for."""
    return tuple(
        Pair(
            Text(prompt := words(seed, 4), f"w40 {words(seed + 300, 3)} w40"),
            Text(prompt, f"w50 {words(seed + 600, 2)} w50"),
            prompt,
        )
        for seed in range(start, start + count)
    )


def behaviour() -> Behaviour:
    neutral = tuple(Text(words(seed, 4), words(seed + 400, 6)) for seed in range(9000, 9005))
    return Behaviour(pairs(1000, 6), pairs(3000, 8), pairs(5000, 12), neutral, (), (), {})


def recipe(folder: Path = Path(), **options: Any) -> Recipe:
    chosen = {
        "layers": [2, 3],
        "coefficients": [1.6, 2.5],
        "prompts": 8,
        "sweep_prompts": 4,
        "sweep_pairs": 6,
        "sweep_neutral": 4,
        "control_pairs": 6,
        "max_new_tokens": 5,
        "max_perplexity_ratio": 20.0,
        "max_repetition": 0.9,
        "dose_prompts": 2,
        **options,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": "tiny",
            "seed": 3,
            "data": {name: f"{name}.jsonl" for name in SPLITS},
            "validate": {"score": {"kind": "keywords", "patterns": ["w40"]}, **chosen},
            "folder": folder,
        }
    )


def toward_w40(**changes: Any) -> Directions:
    """Towards the embedding of w40, which is the head's row of it too; as long as the stream is."""
    table = chatty().model.get_input_embeddings().weight
    one = table[40] - table[50]
    generator = torch.Generator().manual_seed(8)
    vectors = torch.stack([7.0 * one / one.norm()] * LAYERS)
    shuffled = torch.randn(6, LAYERS, HIDDEN, generator=generator)
    shuffled = 7.0 * shuffled / shuffled.norm(dim=-1, keepdim=True)
    return replace(Directions(vectors, shuffled, "tiny-qwen2", REVISION, "resid_post", "inputs"), **changes)


def run(directions: Directions, **options: Any) -> tuple[ValidationReport, list[dict[str, Any]], list[Program]]:
    kept: list[Program] = []

    def keep(program: Program) -> str:
        kept.append(program)
        return "hash"

    one = recipe(**options)
    data = replace(behaviour(), mismatched=other_behaviour(one))
    found = validate(one, chatty(), data, directions, keep, "inputs", Progress())
    return *found, kept


@cache
def usual() -> tuple[ValidationReport, list[dict[str, Any]], list[Program]]:
    return run(toward_w40())


# ---------------------------------------------------------------------------------------- whole stage


def test_the_chosen_program_is_kept_and_measured_on_test_data() -> None:
    report, _rows, (program,) = usual()
    (one,) = program.interventions
    assert (one.site.layer, one.coefficient) == (report.layer, report.coefficient)
    assert (report.program_hash, report.inputs, report.n_pairs, report.n_prompts) == ("hash", "inputs", 12, 8)
    bench = Bench(chatty(), behaviour().test)
    assert report.margin.value == pytest.approx(bench.effects([program]).mean(), abs=1e-4)
    assert report.margin.value > 0 and report.p_margin <= 0.05
    assert report.scores.steered > report.scores.base
    assert len(report.controls.random) == 20 and len(report.controls.shuffled) == 6
    assert report.coherence.strength == pytest.approx(
        7.0
        * report.coefficient
        / float(Stream.of(chatty(), behaviour().neutral, "resid_post", program).norms[report.layer])
    )


def test_no_more_pairs_are_measured_than_asked_for_whatever_the_prompts() -> None:
    report, rows, _programs = run(toward_w40(), pairs=5)
    assert (report.n_pairs, report.n_prompts) == (5, 8)
    assert [row["kind"] for row in rows].count("pair") == 5
    assert report.power[0].available == 5


def test_a_report_comes_back_from_disk_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    report, _rows, _kept = usual()
    report.save(tmp_path / "a.json")
    assert ValidationReport.load(tmp_path / "a.json") == report
    content = json.loads((tmp_path / "a.json").read_text())
    del content["coefficient_sweep"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="is not a validation report"):
        ValidationReport.load(tmp_path / "a.json")


def test_every_test_pair_and_prompt_has_its_row() -> None:
    report, rows, _kept = usual()
    of_pairs, of_answers = ([row for row in rows if row["kind"] == kind] for kind in ("pair", "answer"))
    assert [row["prompt"] for row in of_pairs] == [pair.prompt for pair in behaviour().test]
    assert np.mean([row["steered"] - row["base"] for row in of_pairs]) == pytest.approx(report.margin.value)
    assert len(of_answers) == 8
    assert np.mean([row["steered"]["score"] for row in of_answers]) == pytest.approx(report.scores.steered)
    assert set(of_answers[0]) == {"kind", "prompt", "base", "steered", "random", "few_shot"}
    json.dumps(rows)


def test_the_dose_response_holds_the_base_and_both_signs_and_knows_its_wall() -> None:
    report, _rows, _kept = run(toward_w40(), max_perplexity_ratio=1.05, coefficients=[1.2])
    doses = report.coefficient_sweep
    found = [dose.coefficient for dose in doses.points]
    assert found == sorted(found) and found[0] < 0 < found[-1]
    zero = next(dose for dose in doses.points if dose.coefficient == 0)
    assert (zero.margin, zero.perplexity_ratio) == (0.0, 1.0)
    assert doses.crossing is not None
    below = max((d for d in doses.points if 0 <= d.coefficient < doses.crossing), key=lambda d: d.coefficient)
    above = min((d for d in doses.points if d.coefficient > doses.crossing), key=lambda d: d.coefficient)
    assert below.perplexity_ratio <= 1.05 < above.perplexity_ratio


def test_a_joint_program_is_one_candidate_at_every_block() -> None:
    small = toward_w40().vectors / 3
    report, _rows, (program,) = run(toward_w40(vectors=small, joint=True), layers="auto", coefficients=[0.4])
    assert report.layer == EVERY_BLOCK and report.where == block_name(EVERY_BLOCK) == "every block"
    assert [i.site.layer for i in program.interventions] == list(range(LAYERS))
    with pytest.raises(RecipeError, match="act at every block at once"):
        candidates(recipe().validate_, toward_w40(joint=True))


def test_a_clamp_is_validated_like_an_addition() -> None:
    directions = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5))
    report, _rows, (program,) = run(directions, coefficients=[0.8])
    assert program.interventions[0].operation == "clamp"
    assert report.margin.value > 0 and len(report.controls.random) == 20
    assert report.coherence.strength > 0


def test_negative_coefficients_exclude_and_their_slopes_have_the_right_sign() -> None:
    away = toward_w40(vectors=-toward_w40().vectors)
    report, _rows, _kept = run(away, coefficients=[-1.6, -2.5])
    assert report.coefficient < 0 < report.margin.value
    assert report.steerability < 0
    assert report.controls.opposite < 0


def test_directions_without_shuffled_ones_are_judged_without_them_and_it_is_said() -> None:
    report, _rows, _kept = run(toward_w40(shuffled=torch.zeros(0, LAYERS, HIDDEN)))
    assert report.controls.shuffled == [] and report.controls.p_shuffled is None
    assert any("that control is missing" in note for note in report.notes)


def test_another_behaviours_pairs_give_a_control(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": words(s, 3), "positive": f"w77 {words(s + 9, 3)}", "negative": "w12 w13"} for s in range(7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    report, _rows, _kept = run(toward_w40(), folder=tmp_path, mismatched=Path("other.jsonl"))
    assert report.controls.other_behaviour is not None and report.controls.other_behaviour < report.controls.effect
    path.write_text('{"prompt": "w8"}')
    with pytest.raises(RecipeError, match="needed the keys prompt, positive, negative"):
        run(toward_w40(), folder=tmp_path, mismatched=Path("other.jsonl"))


def test_what_the_claims_need_is_told_before_the_sweep() -> None:
    told: list[str] = []

    class Listening(Progress):
        def note(self, text: str) -> None:
            told.append(text)

    directions = toward_w40(vectors=torch.zeros(LAYERS, HIDDEN))
    with pytest.raises(RecipeError, match="are all 0"):
        validate(recipe(), chatty(), behaviour(), directions, lambda _p: "", "", Listening())
    assert not told
    validate(recipe(coefficients=[0.5]), chatty(), behaviour(), toward_w40(), lambda _p: "", "", Listening())
    assert told[0].startswith("log-likelihood margin: a change of 0.1 nats/token needs ") and "there are 12" in told[0]
    assert told[1].startswith("score: a change of 0.2 needs ") and "there are 8" in told[1]


# ----------------------------------------------------------------------------------------------- sweep


def sweep_bench() -> Bench:
    return Bench(chatty(), behaviour().validation[:6], behaviour().neutral[:4])


class Rising(Bench):
    """A random model may find neutral text more likely when it is steered; this one's perplexity has a known wall."""

    def perplexity_ratio(self, program: Program) -> float:
        (one,) = program.interventions
        return math.exp(0.11 * one.coefficient**2 / (1 + one.site.layer))


def rising() -> Bench:
    return Rising(chatty(), behaviour().validation[:6], behaviour().neutral[:4])


def make(layer: int, coefficient: float) -> Program:
    return toward_w40().program(layer, coefficient, "all")


def test_a_layer_stops_beyond_the_ceiling_and_says_what_it_left_out() -> None:
    grid = (0.4, 3.0, 9.0, -0.4)
    options = recipe(coefficients=grid, max_perplexity_ratio=1.4).validate_
    cells, effects = measure_layers(rising(), options, [1], make, Progress())
    assert [cell.coefficient for cell in cells] == list(grid)
    kept, stop, beyond, negative = cells
    assert not kept.skipped and not negative.skipped and set(effects) == {(1, 0.4), (1, -0.4)}
    assert stop.skipped.startswith("neutral perplexity x") and stop.perplexity_ratio == pytest.approx(math.exp(0.495))
    assert beyond.skipped == "coefficient 3 of this layer is beyond the ceiling already"
    assert beyond.perplexity_ratio is None and beyond.margin is None
    everything, _effects = measure_layers(rising(), options, [1], make, Progress(), margin=math.inf)
    assert not any(cell.skipped for cell in everything)
    assert everything[0] == kept and everything[1].perplexity_ratio == pytest.approx(stop.perplexity_ratio, rel=1e-6)


def test_a_solver_finds_the_largest_coefficient_below_the_ceiling_in_a_handful_of_evaluations() -> None:
    options = recipe(coefficients={"ceiling": 1.3}).validate_
    cells, _effects = measure_layers(rising(), options, [1, 2], make, Progress())
    for cell in cells:
        exact = math.sqrt(math.log(1.3) * (1 + cell.layer) / 0.11)
        assert cell.evaluations is not None and cell.evaluations <= 6
        assert 0.98 * exact <= cell.coefficient <= exact * (1 + 1e-9)


def test_a_solver_finds_the_coefficient_of_a_divergence() -> None:
    options = recipe(coefficients={"kl": 0.2}).validate_
    cells, _effects = measure_layers(sweep_bench(), options, [1, 2], make, Progress())
    for cell in cells:
        assert cell.evaluations is not None and cell.evaluations <= 8
        assert sweep_bench().divergence(make(cell.layer, cell.coefficient)) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("power", [1.3, 2.0, 2.9])
@pytest.mark.parametrize("root", [0.031, 0.4, 1.0, 7.3, 40.0])
def test_the_solver_is_within_its_tolerance_for_curves_that_are_no_parabolas(power: float, root: float) -> None:
    def curve(c: float) -> float:
        return math.pow(c / root, power) * 0.3 + 0.02 * math.pow(c / root, 4) - 0.02

    below, near = (solve(curve, 0.3, below=below) for below in (True, False))
    for found in (below, near):
        assert found.coefficient == pytest.approx(root, rel=0.02) and len(found.evaluations) <= 8
    assert (below.coefficient or math.inf) <= root * (1 + 1e-9)


def test_what_no_coefficient_reaches_is_skipped_with_the_reason() -> None:
    options = recipe(coefficients={"kl": 500.0}).validate_
    (cell,), effects = measure_layers(sweep_bench(), options, [1], make, Progress())
    assert "reaches KL(steered||base) = 500" in cell.skipped and not effects


@pytest.mark.parametrize(
    ("near", "asked"), [(1.0, [1.0, 1.5, 2.0]), (1.6, [1.5, 2.0]), (9.0, [3.0, 2.0, 1.5]), (0.1, 4)]
)
def test_the_largest_that_holds_is_found_from_where_it_was_last(near: float, asked: list[float] | int) -> None:
    seen: list[float] = []

    def holds(value: float) -> bool:
        seen.append(value)
        return value < 1.8

    assert climb(holds, [0.5, 1.0, 1.5, 2.0, 3.0], near) == 1.5
    assert seen == asked or len(seen) == asked
    assert climb(lambda _value: False, [0.5, 1.0], near) is None
    assert climb(lambda _value: True, [0.5, 1.0], near) == 1.0


def test_halving_keeps_the_layers_that_a_whole_grid_would() -> None:
    vectors = toward_w40().vectors.clone()
    vectors[[0, 1]] = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    directions = toward_w40(vectors=vectors)
    options = recipe(layers="search", coefficients=[0.4, 0.8], sweep_layers=1).validate_
    import compile_steer.validate.sweep as module

    def pick(layer: int, c: float) -> Program:
        return directions.program(layer, c, "all")

    before = module._LAST_LAYERS
    module._LAST_LAYERS = 1
    try:
        left, rungs = search_layers(chatty(), behaviour(), options, range(LAYERS), pick, Progress())
    finally:
        module._LAST_LAYERS = before
    assert [rung.pairs for rung in rungs] == [4, 6] and [len(rung.margins) for rung in rungs] == [4, 2]
    cells, _effects = measure_layers(sweep_bench(), options, range(LAYERS), pick, Progress())
    best = max((cell for cell in cells if cell.margin is not None), key=lambda cell: cell.margin or 0.0)
    assert left == [best.layer]


# -------------------------------------------------------------------------------------------- controls


def test_controls_have_the_dose_of_the_program_at_every_site() -> None:
    base = Stream.of(chatty(), behaviour().neutral, "resid_post", make(1, 0.7))
    lengths = torch.tensor([1.5, 2.5, 3.5, 4.5]).unsqueeze(1)
    joint = toward_w40(joint=True, vectors=toward_w40().vectors / 7 * lengths).program(EVERY_BLOCK, 0.7, "all")
    one, other = base.random(joint, 2, seed=4)
    for program in (one, other):
        assert [float(i.vector.norm()) for i in program.interventions] == pytest.approx([1.5, 2.5, 3.5, 4.5])
        units = torch.stack([i.vector / i.vector.norm() for i in program.interventions])
        assert float((units @ units.T - torch.eye(LAYERS)).abs().max()) < 0.9  # each site has its own
    assert not torch.equal(one.interventions[0].vector, other.interventions[0].vector)
    clamp = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5)).program(2, 0.7, "response")
    stream = Stream.of(chatty(), behaviour().neutral, "resid_post", clamp)
    for program in stream.random(clamp, 3, seed=5):
        (i,) = program.interventions
        assert float(i.vector.norm()) == pytest.approx(1.0)
        assert stream.shift(i) == pytest.approx(stream.shift(clamp.interventions[0]), rel=1e-4)
    assert stream.strength(clamp) == pytest.approx(
        0.7 * abs(stream.shift(clamp.interventions[0])) / float(stream.norms[2])
    )


def test_a_random_direction_in_the_programs_place_is_one_of_many() -> None:
    stream = Stream.of(chatty(), behaviour().neutral, "resid_post", make(2, 0.8))
    bench = Bench(chatty(), behaviour().test)
    good = measure_controls(bench, make(2, 0.8), stream.random(make(2, 0.8), 20, 1), [], None, lambda _n: None)
    assert good.p_value == pytest.approx(1 / 21) and good.p_random < 0.01
    (fake,) = stream.random(make(2, 0.8), 1, seed=77)
    bad = measure_controls(bench, fake, stream.random(fake, 20, 1), [], None, lambda _n: None)
    assert bad.p_random > 0.01


def beside_w40() -> Directions:
    """Every block at once, with vectors at a second point."""
    one = toward_w40(joint=True)
    noise = torch.randn(7, LAYERS, HIDDEN, generator=torch.Generator().manual_seed(9))
    lengths = torch.tensor([0.5, 1.5, 2.5, 3.5])[:LAYERS, None]
    beside: dict[Point, torch.Tensor] = {"mlp_out": noise / noise.norm(dim=-1, keepdim=True) * 2.0}
    return replace(one, vectors=one.vectors / 7 * lengths, shuffled=one.shuffled / 7 * lengths, beside=beside)


@pytest.mark.parametrize("kind", ["add", "ablate", "beside"])
def test_a_control_from_shuffled_labels_is_the_whole_program_along_it(kind: str) -> None:
    """With the length that its extraction gave it."""
    directions = beside_w40() if kind == "beside" else toward_w40(operation=kind)
    directions = replace(directions, shuffled=0.3 * directions.shuffled)
    options: dict[str, Any] = {"coefficients": [1.0]} | ({"layers": "auto"} if kind == "beside" else {})
    report, _rows, (program,) = run(directions, **options)
    bench = Bench(chatty(), behaviour().test[:6])
    others = [directions.control(n).program(report.layer, 1.0, "all") for n in range(6)]
    assert [[i.site for i in one.interventions] for one in others] == [[i.site for i in program.interventions]] * 6
    assert report.controls.shuffled == pytest.approx(bench.effects(others).mean(axis=1).tolist(), abs=1e-5)
    assert report.controls.effect == pytest.approx(bench.effects([program]).mean(), abs=1e-5)


def test_an_ablation_takes_one_direction_out_of_every_write_and_so_do_its_controls() -> None:
    program = toward_w40(operation="ablate").program(2, 1.0, "all")
    unit = toward_w40().vectors[2] / 7.0
    assert len(program.interventions) == 1 + 2 * LAYERS
    assert all(torch.allclose(i.vector, unit, atol=1e-6) and i.operation == "ablate" for i in program.interventions)
    stream = Stream.of(chatty(), behaviour().neutral, "resid_post", program)
    one, other = stream.random(program, 2, seed=4)
    for control in (one, other):
        assert len({tuple(i.vector.tolist()) for i in control.interventions}) == 1
        assert [(i.site, i.operation) for i in control.interventions] == [
            (i.site, i.operation) for i in program.interventions
        ]
    assert not torch.equal(one.interventions[0].vector, other.interventions[0].vector)


# ------------------------------------------------------------------------------------------ answering


def test_the_scorer_is_told_the_plain_prompt_whatever_was_said() -> None:
    seen: list[str] = []

    def score(replies: Any) -> np.ndarray:
        seen.extend(reply.prompt for reply in replies)
        return np.zeros(len(replies))

    asked = Request(["w8", "w9"], ask=lambda prompt: Text(f"{prompt} w10", history=(("w7", "w8"),)))
    (plain, _same) = answer(chatty(), [asked, Request(["w11"])], score, 4)
    assert seen == ["w8", "w9", "w11"] and len(plain.texts) == 2


def test_programs_of_other_shapes_are_answered_apart() -> None:
    clamps = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5))
    first, second = clamps.program(1, 0.7, "all"), clamps.program(2, 1.2, "all")

    def score(replies: Any) -> np.ndarray:
        return np.zeros(len(replies))

    prompts = ["w8 w9", "w20 w21 w22"]
    found = answer(chatty(), [Request(prompts, first), Request(prompts), Request(prompts, second)], score, 4)
    for one, program in zip(found, (first, None, second), strict=True):
        if program is None:
            (alone,) = answer(chatty(), [Request(prompts)], score, 4)
        else:
            (alone,) = answer(chatty(), [Request(prompts, program)], score, 4)
        assert one.texts == alone.texts


# --------------------------------------------------------------------------------------------- verdict


def good() -> ValidationReport:
    """A report with nothing against it."""
    report = usual()[0]
    controls = replace(
        report.controls,
        effect=0.6,
        random=[0.01 * n for n in range(-10, 10)],
        shuffled=[0.1, -0.1, 0.05, -0.02, 0.03, 0.01],
        opposite=-0.4,
        other_behaviour=0.1,
        p_value=1 / 21,
        p_random=1e-6,
        p_shuffled=0.001,
    )
    some = Interval(0.4, 0.2, 0.6)
    scores = replace(
        report.scores,
        base=0.05,
        steered=0.45,
        random=0.05,
        effect=some,
        p_value=0.002,
        over_random=some,
        p_over_random=0.002,
        instructed=0.9,
        over_instructed=Interval(-0.45, -0.6, -0.3),
    )
    coherence = replace(report.coherence, perplexity_ratio=1.1, repetition_steered=0.05)
    return replace(
        report, margin=Interval(0.6, 0.5, 0.7), p_margin=1e-4, controls=controls, scores=scores, coherence=coherence
    )


def test_a_report_with_nothing_against_it_passes_with_its_evidence() -> None:
    verdict, reasons = judge(good(), recipe().validate_)
    assert verdict == "pass" and len(reasons) == 4
    assert "random directions score 0.05" in reasons[2]
    assert any("asking is better where the prompt is free" in note for note in remarks(good()))


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("", {"margin": Interval(-0.2, -0.3, -0.1)}, "fail", "the wrong way"),
    ("controls", {"p_value": 2 / 21, "p_random": 0.08}, "fail", "a random direction of the same dose"),
    ("controls", {"p_random": 0.03}, "inconclusive", "not clear of them"),
    ("controls", {"shuffled": [0.7, 0.1]}, "fail", "the pairs do not carry"),
    ("controls", {"p_shuffled": 0.2}, "inconclusive", "not clear of 6 directions from shuffled labels"),
    (
        "controls",
        {"p_shuffled": 0.2, "shuffled_kind": "from other rows"},
        "inconclusive",
        "not clear of 6 directions from other rows",
    ),
    ("controls", {"shuffled": [0.9], "shuffled_kind": "from other rows"}, "fail", "another row or another file"),
    ("controls", {"other_behaviour": 0.8}, "fail", "another behaviour's direction"),
    ("controls", {"opposite": 0.1}, "inconclusive", "not one direction"),
    ("", {"p_margin": 0.2}, "inconclusive", "may be chance"),
    ("scores", {"p_value": 0.25}, "inconclusive", "do not change for certain"),
    ("scores", {"p_over_random": 0.25}, "inconclusive", "not clear of those under random directions"),
    ("scores", {"over_random": Interval(-0.1, -0.2, 0.1)}, "fail", "answering to the damage"),
    ("coherence", {"perplexity_ratio": 21.0}, "fail", "as perplexing"),
    ("coherence", {"repetition_steered": 0.95}, "fail", "repeats itself"),
]


@pytest.mark.parametrize(("part", "changes", "wanted", "words"), CASES)
def test_each_gate_closes_by_itself(part: str, changes: dict[str, Any], wanted: str, words: str) -> None:
    report = good()
    if part:
        changes = {part: replace(getattr(report, part), **changes)}
    verdict, reasons = judge(replace(report, **changes), recipe().validate_)
    assert verdict == wanted and any(words in reason for reason in reasons)


def test_a_direction_that_separates_but_does_not_steer_is_told_so() -> None:
    report = good()
    controls = replace(report.controls, p_value=0.3, p_random=0.3)
    separates = replace(report.separability, auroc=0.98)
    _verdict, reasons = judge(replace(report, controls=controls, separability=separates), recipe().validate_)
    assert reasons[0].startswith("the direction separates the pairs (AUROC 0.98), but a random direction")


@pytest.mark.parametrize(
    ("p_random", "p_over_random", "wanted"),
    [(0.013, 1e-4, "pass"), (1e-4, 0.04, "pass"), (0.0015, 0.0015, "inconclusive"), (0.0009, 0.0015, "pass")],
)
def test_beyond_random_directions_on_the_pairs_or_on_the_answers_with_bonferroni(
    p_random: float, p_over_random: float, wanted: str
) -> None:
    report = good()
    controls = replace(report.controls, p_random=p_random)
    scores = replace(report.scores, p_over_random=p_over_random)
    assert judge(replace(report, controls=controls, scores=scores), recipe().validate_)[0] == wanted


def test_the_least_score_counts() -> None:
    verdict, reasons = judge(good(), recipe(min_score=0.6).validate_)
    assert verdict == "fail" and "below 0.6" in reasons[0]


def test_reports_are_json() -> None:
    json.dumps(asdict(usual()[0]), allow_nan=False)
