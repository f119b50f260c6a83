"""The compiled model's expected score from the weights of the steered model's answers: statistics, and on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_steer.data.behaviour import Question
from compile_steer.models.fingerprint import reference_logprobs
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import answer_logprobs, final_states
from compile_steer.models.reload import reload
from compile_steer.models.tokens import Encoded
from compile_steer.report.terminal import details
from compile_steer.scoring.text import Keywords
from compile_steer.stats import LEVEL, equivalence
from compile_steer.verification.gates import judged
from compile_steer.verification.parity import Parity
from compile_steer.verification.planned import planned_tests
from compile_steer.verification.sampled_score import looks, weighted_score
from compile_steer.verification.stage import verify_artifact
from tests.helpers import planted
from tests.helpers.verification import PROGRAM_HASH, VerifierCase, behaviour, make_reference, recipe

SETTINGS: dict[str, Any] = {"prompts_per_set": 2, "long": 0, "free_tokens": 4}
LAST = list(looks(8))[-1][1]


def spoiled(case: VerifierCase, factor: float) -> LoadedModel:
    """The exact compile with its bias times `factor`."""
    folder = case.merged(f"times {factor}")
    planted.plant(planted.times_merged(factor), folder, Path(case.base.source))
    return reload(folder, case.base)


# -------------------------------------------------------------------------------------- statistics


def draws(
    seed: int, rounds: int, prompts: int, error: float, link: float, level: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Log weights that are normal with variance `error`^2, and scores of 0 or 1 whose log odds grow with them by `link`."""
    rng = np.random.default_rng(seed)
    z, of_prompt = rng.standard_normal((rounds, prompts)), rng.standard_normal(prompts)
    scores = rng.random((rounds, prompts)) < 1 / (1 + np.exp(-(level + of_prompt + link * z)))
    return error * z - error**2 / 2, scores.astype(float)


def test_the_estimate_is_the_mean_of_w_minus_1_times_the_centred_score() -> None:
    log_weights = np.log([[1.2, 0.9, 1.1], [0.8, 1.0, 1.0]])
    scores = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    sampled, test = weighted_score(log_weights, scores, 0.5, 0.05)
    # the others' mean scores are 3/4, 3/4 and 2/4
    expected = ((0.2 * 0.25 - 0.2 * -0.75) + (-0.1 * -0.75 + 0.0) + (0.1 * 0.5 + 0.0)) / 6
    assert test is not None and test.difference == pytest.approx(expected) and test.n == 3
    assert sampled.effective == pytest.approx(6.0**2 / (1.44 + 0.81 + 1.21 + 0.64 + 1 + 1))
    assert (sampled.n_prompts, sampled.n_samples) == (3, 6) and sampled.mean_weight == pytest.approx(1.0)


def test_the_estimate_has_no_bias_whatever_is_sampled() -> None:
    steered, compiled = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.36, 0.32, 0.19, 0.13])
    of_text, rng, found = np.array([1.0, 0.0, 0.5, 1.0]), np.random.default_rng(0), []
    for _ in range(80):
        texts = rng.choice(4, (2, 30), p=steered)
        _sampled, test = weighted_score(np.log(compiled / steered)[texts], of_text[texts], 1.0, 0.05)
        assert test is not None
        found.append(test.difference)
    true = float(((compiled - steered) * of_text).sum())
    assert np.mean(found) == pytest.approx(true, abs=3 * np.std(found) / 80**0.5) and abs(true) < 0.02


@pytest.mark.parametrize("scores", [np.ones((1, 9)), np.eye(9)[:1]])
def test_weights_of_1_show_equivalence_at_once_whatever_the_scores_are(scores: np.ndarray) -> None:
    noise = 1e-6 * np.random.default_rng(0).standard_normal((1, 9))
    for log_weights in (np.zeros((1, 9)), noise):
        _sampled, test = weighted_score(log_weights, scores, 0.05, LEVEL / 8)
        assert test is not None and test.equivalent and max(-test.low, test.high) < 1e-5


def test_scores_that_are_all_alike_show_nothing_until_a_rare_one_would_have_been_seen() -> None:
    log_weights, _scores = draws(1, 8, 34, 0.3, 0.0)
    few, many = (weighted_score(log_weights[:n], np.ones((n, 34)), 0.05, LAST)[1] for n in (1, 8))
    assert few is not None and many is not None and few.difference == many.difference == 0
    assert not few.equivalent and not few.enough and "underpowered" in str(few)
    assert many.equivalent


@pytest.mark.parametrize(
    ("log_weights", "why"),
    [
        (np.full((2, 10), -2000.0), "the mean weight is 0.000, not 1"),  # underflow, all alike
        (np.full((2, 10), -0.5), "the mean weight is 0.607, not 1"),
        (np.full((2, 10), -np.inf), "0.0 effective answers of 20 are too few"),
        (np.where(np.arange(20).reshape(2, 10), 0.0, 900.0), "1.0 effective answers of 20 are too few"),  # overflow
        (np.where(np.arange(20).reshape(2, 10) < 12, -np.inf, 0.9), "8.0 effective answers of 20 are too few"),
    ],
)
def test_weights_that_are_no_basis_are_rejected_with_the_reason(log_weights: np.ndarray, why: str) -> None:
    sampled, test = weighted_score(log_weights, np.tile([0.0, 1.0], (2, 5)), 0.05, LEVEL)
    assert test is None and why in sampled.rejected


@pytest.mark.parametrize("rounds", [1, 2, 3, 6, 8])
def test_the_levels_of_all_looks_sum_to_the_level(rounds: int) -> None:
    taken, levels = zip(*looks(rounds), strict=True)
    assert sum(levels) == pytest.approx(LEVEL) and taken[0] == 1 and taken[-1] == rounds
    assert list(looks(8)) == [(1, LEVEL / 8), (2, LEVEL / 8), (4, LEVEL / 4), (8, LEVEL / 2)]


def outcome(seed: int, error: float, link: float, level: float) -> str:
    log_weights, scores = draws(seed, 8, 34, error, link, level)
    for rounds, of_look in looks(8):
        _sampled, test = weighted_score(log_weights[:rounds], scores[:rounds], 0.05, of_look)
        if test is None or test.equivalent or test.different:
            return "rejected" if test is None else "equivalent" if test.equivalent else "different"
    return "open"


def test_a_difference_of_the_margin_is_called_equivalent_in_at_most_5_percent() -> None:
    """Of 34 prompts and four answers to each, with the scores that are hardest: rare ones that the weights favour."""
    log_weights, scores = draws(0, 2000, 200, 0.63, 0.77, -2.5)
    assert (np.exp(log_weights) * scores).mean() - scores.mean() == pytest.approx(0.05, abs=0.005)
    corrected = plain = 0
    for seed in range(80):
        log_weights, scores = draws(seed, 4, 34, 0.63, 0.77, -2.5)
        _sampled, test = weighted_score(log_weights, scores, 0.05, LEVEL)
        corrected += test is not None and test.equivalent
        values = (np.exp(log_weights) - 1) * (scores - scores.mean())
        plain += equivalence("score", values.mean(axis=0), 0.05, LEVEL).equivalent
    limit = 80 * LEVEL + 2 * (80 * LEVEL * (1 - LEVEL)) ** 0.5
    assert corrected <= limit < plain, "Student's t, without the two corrections, is wrong more often"


def test_no_difference_is_shown_with_fewer_answers_where_the_weights_spread_less() -> None:
    assert [outcome(seed, 0.1, 0.0, 0.0) for seed in range(10)].count("equivalent") >= 9
    assert "equivalent" not in {outcome(seed, 3.0, 0.0, 0.0) for seed in range(10)}


# ---------------------------------------------------------------------------------------- the model


def test_only_the_last_answer_counts_and_its_end_does(case: VerifierCase) -> None:
    texts = [Encoded((9, 8, 7, 6, 10, 2), 4, ((1, 3),)), Encoded((11, 12, 13), 2), Encoded((14, 15), 2)]
    found = answer_logprobs(case.base.model, texts, final_states(case.base, texts))
    for text, value in zip(texts, found, strict=True):
        expected = reference_logprobs(case.base.model, [text.ids])[text.n_prompt - 1 :].sum()
        assert value == pytest.approx(expected, abs=1e-4)


def test_a_gate_that_lets_everything_pass_plans_more_answers_than_there_are(case: VerifierCase) -> None:
    reference = make_reference(case.base, case.program, gates={"kl_remaining": 1e6}, **SETTINGS)
    (plan,) = [plan for plan in planned_tests(reference) if plan.measure == "score"]
    assert 1e4 < plan.needed < 1e8 and "too few" in str(plan)


@pytest.mark.parametrize("samples", [1, 8])
def test_scores_that_are_all_alike_are_planned_by_their_answers(case: VerifierCase, samples: int) -> None:
    reference = make_reference(case.base, case.program, samples_per_prompt=samples, **SETTINGS)
    assert reference.sampled_scores is not None
    reference.sampled_scores.scores.fill(1.0)
    (plan,) = [plan for plan in planned_tests(reference) if plan.measure == "score"]
    rare = math.log(list(looks(samples))[-1][1]) / math.log1p(-plan.effect)
    assert plan.needed == math.ceil(math.ceil(rare) / samples)


def test_an_exact_compile_takes_one_answer_a_prompt_and_has_no_interval(case: VerifierCase, exact: Parity) -> None:
    b = exact.behaviour
    assert b.sampled is not None and not b.sampled.rejected and b.score.equivalent and exact.passed
    assert b.sampled.n_samples == b.sampled.n_prompts == 20 == b.score.n, "12 test and 8 held-out prompts"
    assert b.sampled.mean_weight == pytest.approx(1, abs=1e-4) and b.sampled.effective == pytest.approx(20, abs=1e-3)
    assert max(abs(b.score.low), b.score.high) < 1e-4
    assert "score" in {check.name for check in exact.checks if check.outcome == "passed"}
    (row,) = [text for label, text in details(exact) if label == "score"]
    assert row == f"by {b.sampled}" and "20 answers that the steered model sampled to 20 prompts" in row


def test_the_weights_tell_what_free_answers_show(case: VerifierCase) -> None:
    """The expected score of a compile that is 10 % short, from 16 of the steered model's answers to each prompt."""
    reference, artifact = make_reference(case.base, case.program, samples_per_prompt=16, **SETTINGS), spoiled(case, 0.9)
    samples = reference.sampled_scores
    assert samples is not None
    _sampled, test = reference.compare_score(artifact, final_states(artifact, reference.heldout))
    score = recipe().validate_.score.bind(case.base, behaviour())

    def mean_score(model: LoadedModel, steered: bool) -> float:
        program = case.program if steered else None
        scores = []
        for seed in range(5):
            prompts = list(samples.prompts) * 10
            texts = continue_prompts(model, prompts, program, max_new_tokens=6, temperature=1.0, seed=100 + seed)
            scores.append(["w4" in response_text(model, text) for text in texts])
        return float(np.mean(scores))

    assert score is not None and test is not None
    free = mean_score(artifact, False) - mean_score(case.base, True)
    error = (2 * 0.25 / 1000) ** 0.5
    assert abs(test.difference - free) < 3 * ((test.spread**2 / test.n) + error**2) ** 0.5


@pytest.mark.parametrize("factor", [-1.0, 0.0, 2.0])
def test_a_fault_leaves_no_weights_and_is_answered_by_free_answers(case: VerifierCase, factor: float) -> None:
    folder = case.merged(f"faulty {factor}")
    planted.plant(planted.times_merged(factor), folder, Path(case.base.source))
    parity = case.parity_of(folder)
    b = parity.behaviour
    assert not parity.passed and b.sampled is not None and b.sampled.rejected and not b.score.equivalent
    assert b.sampled.n_samples <= 40, "more of them would not help"
    assert b.score.n == b.n_prompts == 12 and b.score.difference == pytest.approx(b.score_compiled - b.score_steered)
    (row,) = [text for label, text in details(parity) if label == "score"]
    assert row.startswith(f"by each model's own greedy answers to 12 test prompts, because {b.sampled.rejected}")


def test_a_difference_that_is_shown_fails_however_few_the_answers_are(exact: Parity) -> None:
    off = equivalence("score", np.full(5, 0.4), 0.05)
    assert off.different and not off.enough
    wrong = replace(exact, behaviour=replace(exact.behaviour, score=off))
    assert judged(wrong, recipe().verify.gates).reasons == [str(off)]


def test_answers_are_drawn_once_for_all_artifacts(case: VerifierCase, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_reference(case.base, case.program, samples_per_prompt=3, **SETTINGS)
    artifact, drawn = spoiled(case, 0.95), list[dict[str, Any]]()

    def recorded(*args: Any, **settings: Any) -> list[Encoded]:
        drawn.append(settings)
        return continue_prompts(*args, **settings)

    monkeypatch.setattr("compile_steer.verification.sampled_score.continue_prompts", recorded)
    states = final_states(artifact, reference.heldout)
    first, second = (reference.compare_score(artifact, states) for _ in range(2))
    assert first == second and first[0] is not None
    assert len({one["seed"] for one in drawn}) == len(drawn) == first[0].n_samples // 20 - 1 > 0
    assert {(one["temperature"], one["max_new_tokens"]) for one in drawn} == {(1.0, 6)}


def test_a_scorer_of_the_data_s_own_prompts_has_answers_to_the_test_prompts(
    case: VerifierCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keywords, "needs_no_labels", False)
    reference = make_reference(case.base, case.program, **SETTINGS)
    artifact = reload(case.merged("own"), case.base)
    sampled, test = reference.compare_score(artifact, final_states(artifact, reference.heldout))
    assert sampled is not None and sampled.n_prompts == 12 and test is not None and test.equivalent


def test_multiple_choice_questions_have_no_sampled_answers(case: VerifierCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keywords, "needs_no_labels", False)
    data = behaviour()
    reference = make_reference(case.base, case.program, **SETTINGS)
    questions = {pair.prompt: Question(pair.prompt, ("w6", "w7"), 0) for pair in data.test[1:]}
    monkeypatch.setattr(reference, "sampled_scores", reference.sample_scores(replace(data, questions=questions)))
    assert reference.sampled_scores is None, "one prompt is left, and a mean of one has no interval"
    monkeypatch.setattr(reference, "measured", [])  # made with answers that could be sampled
    parity = verify_artifact(reference, case.merged("questions"), PROGRAM_HASH)
    assert parity.behaviour.sampled is None and parity.behaviour.score.n == 12
    assert dict(details(parity))["score"].endswith("test prompts; no sampled answers were weighted")
    assert [plan.measure for plan in planned_tests(reference)] == ["log-likelihood margin", "score"]
