"""The verdict: each of its reasons alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from compile_steer.stats import Interval
from compile_steer.validation.report import ValidationReport
from compile_steer.validation.verdict import decide, remarks
from tests.helpers.validation import options, usual_validation


def good() -> ValidationReport:
    """A report with nothing against it."""
    report = usual_validation().report
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


def test_a_report_without_failures_or_doubts_passes_with_its_evidence() -> None:
    verdict, reasons = decide(good(), options())
    assert verdict == "pass" and len(reasons) == 4
    assert "random directions score 0.05" in reasons[2]
    assert any("asking is better where the prompt is free" in note for note in remarks(good()))


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("", {"margin": Interval(-0.2, -0.3, -0.1)}, "fail", "the wrong way"),
    ("controls", {"p_value": 2 / 21, "p_random": 0.08}, "fail", "a random direction of the same strength"),
    ("controls", {"p_random": 0.03}, "inconclusive", "but not clearly"),
    ("controls", {"shuffled": [0.7, 0.1]}, "fail", "the pairs do not carry"),
    (
        "controls",
        {"p_shuffled": 0.2},
        "inconclusive",
        "not clearly larger than that of 6 directions from shuffled labels",
    ),
    (
        "controls",
        {"p_shuffled": 0.2, "shuffled_kind": "from other rows"},
        "inconclusive",
        "not clearly larger than that of 6 directions from other rows",
    ),
    ("controls", {"shuffled": [0.9], "shuffled_kind": "from other rows"}, "fail", "another row or another file"),
    ("controls", {"other_behaviour": 0.8}, "fail", "another behaviour's direction"),
    ("controls", {"opposite": 0.1}, "inconclusive", "not linear in the direction"),
    ("", {"p_margin": 0.2}, "inconclusive", "may be chance"),
    ("scores", {"p_value": 0.25}, "inconclusive", "do not change significantly"),
    (
        "scores",
        {"p_over_random": 0.25},
        "inconclusive",
        "do not differ significantly from those under random directions",
    ),
    ("scores", {"over_random": Interval(-0.1, -0.2, 0.1)}, "fail", "responds to the damage"),
    ("coherence", {"perplexity_ratio": 21.0}, "fail", "perplexity of control text rises 21.00-fold"),
    ("coherence", {"repetition_steered": 0.95}, "fail", "repeats itself"),
]


@pytest.mark.parametrize(("part", "changes", "expected", "words"), CASES)
def test_each_gate_changes_the_verdict_alone(part: str, changes: dict[str, Any], expected: str, words: str) -> None:
    report = good()
    if part:
        changes = {part: replace(getattr(report, part), **changes)}
    verdict, reasons = decide(replace(report, **changes), options())
    assert verdict == expected and any(words in reason for reason in reasons)


def test_a_direction_that_separates_but_does_not_steer_fails() -> None:
    report = good()
    controls = replace(report.controls, p_value=0.3, p_random=0.3)
    separates = replace(report.separability, auroc=0.98)
    _verdict, reasons = decide(replace(report, controls=controls, separability=separates), options())
    assert reasons[0].startswith("the direction separates the pairs (AUROC 0.98), but a random direction")


@pytest.mark.parametrize(
    ("p_random", "p_over_random", "expected"),
    [(0.013, 1e-4, "pass"), (1e-4, 0.04, "pass"), (0.0015, 0.0015, "inconclusive"), (0.0009, 0.0015, "pass")],
)
def test_pairs_or_answers_must_be_outliers_with_bonferroni(
    p_random: float, p_over_random: float, expected: str
) -> None:
    report = good()
    controls = replace(report.controls, p_random=p_random)
    scores = replace(report.scores, p_over_random=p_over_random)
    assert decide(replace(report, controls=controls, scores=scores), options())[0] == expected


def test_a_score_below_the_minimum_fails() -> None:
    verdict, reasons = decide(good(), options(min_score=0.6))
    assert verdict == "fail" and "below 0.6" in reasons[0]


def test_reports_are_json() -> None:
    json.dumps(asdict(usual_validation().report), allow_nan=False)
