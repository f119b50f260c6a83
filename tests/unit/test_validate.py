"""The validation stage on a tiny model, as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.pairs import read_pairs
from compile_steer.validation.controls import StreamStatistics
from compile_steer.validation.evaluator import ContrastEvaluator
from compile_steer.validation.report import ValidationReport
from tests.helpers.tiny import HIDDEN, LAYERS
from tests.helpers.validation import behaviour, chat_model, pairs, toward_w40, usual_validation, validated, words


def test_the_chosen_program_is_measured_on_test_data() -> None:
    result = usual_validation()
    report, program = result.report, result.program
    (intervention,) = program.interventions
    assert (intervention.site.layer, intervention.coefficient) == (report.layer, report.coefficient)
    assert (report.kind, report.n_pairs, report.n_prompts) == ("validation report", 12, 8)
    evaluator = ContrastEvaluator(chat_model(), behaviour().test)
    assert report.margin.value == pytest.approx(evaluator.effects([program]).mean(), abs=1e-4)
    assert report.margin.value > 0 and report.p_margin <= 0.05
    assert report.scores.steered > report.scores.base
    assert len(report.controls.random) == 20 and len(report.controls.shuffled) == 6
    assert report.coherence.strength == pytest.approx(
        7.0
        * report.coefficient
        / float(StreamStatistics.of(chat_model(), behaviour().neutral, "resid_post", program).norms[report.layer])
    )


def test_pairs_and_prompts_are_limited_separately() -> None:
    result = validated(toward_w40(), pairs=5)
    report, rows = result.report, result.rows
    assert (report.n_pairs, report.n_prompts) == (5, 8)
    assert [row["kind"] for row in rows].count("pair") == 5
    assert report.power[0].available == 5


def test_a_report_is_loaded_as_saved_and_a_damaged_one_refused(tmp_path: Path) -> None:
    report = usual_validation().report
    report.save(tmp_path / "a.json")
    assert ValidationReport.load(tmp_path / "a.json") == report
    content = json.loads((tmp_path / "a.json").read_text())
    del content["coefficient_sweep"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="is not a validation report"):
        ValidationReport.load(tmp_path / "a.json")


def test_every_test_pair_and_prompt_has_a_row() -> None:
    result = usual_validation()
    report, rows = result.report, result.rows
    of_pairs, of_answers = ([row for row in rows if row["kind"] == kind] for kind in ("pair", "answer"))
    assert [row["prompt"] for row in of_pairs] == [pair.prompt for pair in behaviour().test]
    assert np.mean([row["steered"] - row["base"] for row in of_pairs]) == pytest.approx(report.margin.value)
    assert len(of_answers) == 8
    assert np.mean([row["steered"]["score"] for row in of_answers]) == pytest.approx(report.scores.steered)
    assert set(of_answers[0]) == {"kind", "prompt", "base", "steered", "random", "few_shot"}
    json.dumps(rows)


def test_the_coefficient_sweep_holds_the_base_and_both_signs_and_its_crossing() -> None:
    report = validated(toward_w40(), max_perplexity_ratio=1.05, coefficients=[1.2]).report
    sweep = report.coefficient_sweep
    coefficients = [point.coefficient for point in sweep.points]
    assert coefficients == sorted(coefficients) and coefficients[0] < 0 < coefficients[-1]
    zero = next(point for point in sweep.points if point.coefficient == 0)
    assert (zero.margin, zero.perplexity_ratio) == (0.0, 1.0)
    assert sweep.crossing is not None
    below = max((p for p in sweep.points if 0 <= p.coefficient < sweep.crossing), key=lambda p: p.coefficient)
    above = min((p for p in sweep.points if p.coefficient > sweep.crossing), key=lambda p: p.coefficient)
    assert below.perplexity_ratio <= 1.05 < above.perplexity_ratio


def test_a_clamp_is_validated_like_an_addition() -> None:
    directions = toward_w40(operation="clamp", projections=torch.full((7, LAYERS), 6.5))
    result = validated(directions, coefficients=[0.8])
    report, program = result.report, result.program
    assert program.interventions[0].operation == "clamp"
    assert report.margin.value > 0 and len(report.controls.random) == 20
    assert report.coherence.strength > 0


def test_negative_coefficients_have_negative_slopes() -> None:
    away = toward_w40(vectors=-toward_w40().vectors)
    report = validated(away, coefficients=[-1.6, -2.5]).report
    assert report.coefficient < 0 < report.margin.value
    assert report.steerability < 0
    assert report.controls.opposite < 0


def test_a_missing_control_from_shuffled_labels_is_noted() -> None:
    report = validated(toward_w40(shuffled=torch.zeros(0, LAYERS, HIDDEN))).report
    assert report.controls.shuffled == [] and report.controls.p_shuffled is None
    assert any("that control is missing" in note for note in report.notes)


def test_another_behaviour_s_pairs_give_a_control(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    rows = [{"prompt": words(s, 3), "positive": f"w77 {words(s + 9, 3)}", "negative": "w12 w13"} for s in range(7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    other = tuple(read_pairs("validate.other_behaviour", path).values())
    report = validated(toward_w40(), replace(behaviour(), other_behaviour=other)).report
    assert report.controls.other_behaviour is not None and report.controls.other_behaviour < report.controls.effect
    path.write_text('{"prompt": "w8"}')
    with pytest.raises(RecipeError, match="needed the keys prompt, positive, negative"):
        read_pairs("validate.other_behaviour", path)


def test_the_power_analysis_is_printed_before_the_sweep() -> None:
    notes: list[str] = []

    class Recording(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    directions = toward_w40(vectors=torch.zeros(LAYERS, HIDDEN))
    with pytest.raises(RecipeError, match="are all 0"):
        validated(directions, progress=Recording())
    assert not notes
    validated(toward_w40(), progress=Recording(), coefficients=[0.5])
    assert (
        notes[0].startswith("log-likelihood margin: a change of 0.1 nats/token needs ") and "there are 12" in notes[0]
    )
    assert notes[1].startswith("score: a change of 0.2 needs ") and "there are 8" in notes[1]


def test_a_baseline_that_does_not_fit_the_model_is_said_to_be_missing() -> None:
    report = validated(toward_w40(), replace(behaviour(), train=pairs(100, 40)), few_shot=40).report
    assert report.scores.few_shot is None
    (note,) = [note for note in report.notes if "validate.few_shot" in note]
    assert note.startswith("showing 40 examples before the prompt (validate.few_shot) was not measured")
    assert "do not fit into the model's 64 positions" in note
    assert not any("validate.few_shot" in note for note in usual_validation().report.notes)
