"""The verdict: each of its reasons alone."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from io import StringIO
from typing import Any

import pytest

from compile_steer.common.terminal import Terminal
from compile_steer.report.terminal import print_validation
from compile_steer.stats import Interval
from compile_steer.validation.report import Confound, SweepPoint, ValidationReport
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
    report = replace(report, margin=Interval(0.6, 0.5, 0.7), p_margin=1e-4, side_effects=[], wordings=[])
    return replace(report, controls=controls, scores=scores, coherence=coherence)


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


def with_points(report: ValidationReport, *points: tuple[float, float, float]) -> ValidationReport:
    """The report with a coefficient sweep of (coefficient, perplexity ratio, score); 2.5 is chosen."""
    measured = [SweepPoint(c, 0.1, ratio, score, 0.0) for c, ratio, score in points]
    sweep = replace(report.coefficient_sweep, points=measured, crossing=None, negative_crossing=None)
    return replace(report, coefficient=2.5, coefficient_sweep=sweep)


POINTS = ((-2.5, 1.2, 0.0), (0.6, 1.1, 0.1), (1.2, 1.3, 0.3), (2.5, 1.4, 0.45), (3.1, 1.45, 0.7), (5.0, 9.0, 0.9))


@pytest.mark.parametrize(
    ("part", "changes", "settings", "advice"),
    [
        (
            "coherence",
            {"perplexity_ratio": 1.7},
            {},
            "use coefficient 1.2, where the perplexity of control text is x1.30",
        ),
        ("scores", {}, {"min_score": 0.6}, "use coefficient 3.1, where the score is 0.70"),
        (
            "scores",
            {},
            {"min_score": 0.8},
            "no larger coefficient is coherent and scores more than 0.80: search all blocks",
        ),
        # Too much and too little at once: one line, and neither a smaller nor a larger coefficient.
        (
            "coherence",
            {"perplexity_ratio": 1.7},
            {"min_score": 0.6},
            "no coefficient of this block does both, 2.5 is too large and too small: search all blocks",
        ),
        ("controls", {"p_value": 2 / 21}, {}, "search all blocks (validate.layers: search), the sweep tried 2"),
        ("controls", {"p_value": 2 / 21}, {"layers": "search"}, "use more training pairs, or another read-out"),
        (
            "scores",
            {"p_value": 0.25, "effect": Interval(0.1, -0.1, 0.3)},
            {},
            "add test prompts: 66 would show an effect of this size, there are 8",
        ),
        (
            "scores",
            {"p_value": 1.0, "effect": Interval(0.0, 0.0, 0.0)},
            {},
            "use coefficient 3.1, where the score is 0.70",
        ),
        (
            "scores",
            {"p_value": 0.4, "effect": Interval(0.001, -0.1, 0.1)},
            {},
            "use coefficient 3.1, where the score is 0.70",
        ),
        ("controls", {"p_shuffled": 0.2}, {}, "extract.shuffled: 12"),
        ("", {"margin": Interval(-0.2, -0.3, -0.1)}, {}, "negate the coefficients (here -2.5)"),
    ],
)
def test_there_is_one_line_of_advice_with_a_number(
    part: str, changes: dict[str, Any], settings: dict[str, Any], advice: str
) -> None:
    report = with_points(good(), *POINTS)
    changes = {part: replace(getattr(report, part), **changes)} if part else changes
    chosen = options(max_perplexity_ratio=1.5, **settings)
    verdict, reasons = decide(replace(report, **changes), chosen)
    assert verdict != "pass" and [reason.startswith("advice: ") for reason in reasons].count(True) == 1
    assert reasons[-1].startswith(f"advice: {advice}") or advice in reasons[-1], reasons
    assert not any("use a " in reason or "; add " in reason or "; try" in reason for reason in reasons[:-1])


def test_the_first_line_names_the_price_and_what_the_effect_is_confounded_with() -> None:
    report = good()
    coherence = replace(report.coherence, repetition_base=0.01, ended_base=0.5, ended_steered=0.25)
    confounds = [Confound("the answer A", "30 of 40", "Swap.")]
    report = replace(report, coherence=coherence, confounds=confounds, verdict="pass")
    assert report.headline == (
        "score 0.05 to 0.45; price: perplexity of control text x1.10, 4 points more repeated 3-grams, 25 points fewer "
        "answers that end by themselves; confounded with the answer A"
    )
    stream = StringIO()
    print_validation(Terminal(file=stream, width=400), report)
    assert f"Verdict on test data: PASS; {report.headline}" in stream.getvalue()
    assert report.headline in repr(report)


def test_reports_are_json() -> None:
    json.dumps(asdict(usual_validation().report), allow_nan=False)
