"""The verifier on a tiny model: its reference, its report, and every gate that is about behaviour or divergence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from compile_steer.artifacts.provenance import PARITY, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.models.logprobs import final_states, logprob_margins
from compile_steer.models.tokens import Encoded
from compile_steer.recipe import Recipe
from compile_steer.report.terminal import print_parities
from compile_steer.stats import Interval, equivalence
from compile_steer.steering.hooks import steered
from compile_steer.verification.gates import judged
from compile_steer.verification.parity import Parity, Rounding
from compile_steer.verification.planned import planned_tests
from tests.helpers.verification import RecordedNotes, VerifierCase, behaviour, make_reference, recipe

GATES = recipe().verify.gates


def with_behaviour(parity: Parity, **changes: Any) -> Parity:
    return replace(parity, behaviour=replace(parity.behaviour, **changes))


def with_divergence(parity: Parity, **changes: Any) -> Parity:
    return replace(parity, divergence=replace(parity.divergence, **changes))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"kinds": 2}, "verify.kinds: is now called verify.prompts_per_set."),
        ({"gates": {"share": 0.1}}, "verify.gates.share: is now called verify.gates.kl_remaining."),
        ({"gates": {"recovery": 0.9}}, "verify.gates.recovery: is now called verify.gates.effect_retained."),
        ({"gates": {"drift_margin": 0.1}}, "verify.gates.drift_margin: is now called verify.gates.control_kl_margin."),
    ],
)
def test_old_recipe_keys_are_answered_with_the_new_ones(old: dict[str, Any], new: str) -> None:
    record = {**recipe().record, "verify": old}
    with pytest.raises(RecipeError, match=re.escape(new)):
        Recipe.recall(record, Path())


# --------------------------------------------------------------------------------------- reference


def test_planned_tests_are_noted_before_any_artifact_is_seen(
    case: VerifierCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", str(tmp_path))
    notes = RecordedNotes()
    reference = make_reference(case.base, case.program, progress=notes)
    plans, margins = planned_tests(reference), reference.equivalence_margins
    assert notes.texts == [str(plan) for plan in plans]
    first, second = plans
    assert (first.measure, second.measure) == ("log-likelihood margin", "score")
    # The weights' variance where KL(steered||compiled) is all that the gate allows: exp(2 KL) - 1; of 8 answers to a prompt.
    kl = 0.02 * float(reference.kl_base.kl.sum()) / 8
    assert reference.sampled_scores is not None
    assert second.spread == pytest.approx(
        reference.sampled_scores.scores.std(ddof=1) * math.sqrt(math.expm1(2 * kl) / 8)
    )
    assert second.available == 20 and [plan.effect for plan in plans] == list(margins.values())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_test_pairs_are_refused(case: VerifierCase, count: int) -> None:
    with pytest.raises(RecipeError, match=f"data.test has {count} pairs; needed: two or more"):
        make_reference(case.base, case.program, behaviour(test=behaviour().test[:count]))


def test_a_program_that_does_nothing_is_refused(case: VerifierCase) -> None:
    with pytest.raises(ArtifactError, match="changes nothing"):
        make_reference(case.base, case.program.scaled(0.0))


def test_a_base_that_is_steered_already_does_not_pass_unseen(case: VerifierCase, exact: Parity) -> None:
    with steered(case.base.model, case.program):
        reference = make_reference(case.base, case.program)
    assert reference.kl_base.mean != pytest.approx(exact.divergence.kl_base, rel=0.01)


def test_states_know_their_texts(case: VerifierCase) -> None:
    texts = [Encoded((9, 8, 7, 6, 10), 2), Encoded((11, 12, 13), 2), Encoded((9, 14, 10, 11), 1)]
    states = final_states(case.base, texts)
    for at, one in enumerate(texts):
        alone = final_states(case.base, [one])
        assert torch.allclose(states.response[states.texts == at], alone.response, atol=1e-5)


def test_equivalence_margins_are_fractions_of_the_effect(case: VerifierCase, exact: Parity) -> None:
    reference = case.reference
    effect = abs(float((reference.margins.steered - reference.margins.base).mean()))
    margin, score = exact.behaviour.margin, exact.behaviour.score
    assert margin is not None
    assert margin.margin == pytest.approx(0.2 * effect) and margin.n == len(reference.margins.base) == 12
    base, steered_answers = reference.answers
    moved = abs(float((steered_answers.scores - base.scores).mean()))
    assert score.margin == pytest.approx(min(0.05, 0.2 * moved) or 0.05)


def test_half_the_program_is_not_equivalent(case: VerifierCase) -> None:
    half = logprob_margins(case.base, case.reference.texts.pairs, case.program.scaled(0.5))
    margin = case.reference.equivalence_margins["log-likelihood margin"]
    assert not equivalence("log-likelihood margin", half - case.reference.margins.steered, margin).equivalent


# ------------------------------------------------------------------------------------------ report


def test_an_exact_compile_is_equivalent_and_its_report_is_read_back(exact: Parity, tmp_path: Path) -> None:
    d, b = exact.divergence, exact.behaviour
    assert b.margin is not None
    assert b.margin.equivalent and b.score.equivalent and abs(b.score.difference) < 1e-5
    assert exact.reasons == [] and exact.passed
    assert 0 <= d.kl.low <= d.kl.value <= d.kl.high < 1e-6
    assert d.kl_remaining.value == pytest.approx(d.kl.value / d.kl_base)
    assert d.n_texts == 8
    exact.save(tmp_path / PARITY)
    assert Parity.load(tmp_path / PARITY) == exact
    assert next(iter(json.loads((tmp_path / PARITY).read_text()).items())) == ("kind", "parity report")


def test_the_terminal_shows_the_tests_and_the_intervals(exact: Parity) -> None:
    stream = StringIO()
    print_parities(Console(file=stream, width=300), [exact])
    text, b, d = stream.getvalue(), exact.behaviour, exact.divergence
    assert "remaining KL [95 %]" in text and str(b.margin) in text and str(b.score) in text
    assert f"KL rms {d.kl_rms:.1e}, p99 {d.kl_p99:.1e}, at the prompts' positions {d.kl_prompt:.1e}" in text
    assert f"gain {d.gain:.3f}, relative error {d.hidden_error:.1e}" in text
    assert f"repeated 3-grams: {b.repetition_compiled:.2f} (steered {b.repetition_steered:.2f})" in text


def test_a_report_of_an_older_version_is_refused_with_what_it_lacks(exact: Parity, tmp_path: Path) -> None:
    content = asdict(exact)
    del content["behaviour"]["score"], content["divergence"]["kl"]
    (tmp_path / PARITY).write_text(json.dumps(content))
    lacking = r"divergence\.kl: missing; behaviour\.score: missing.*'compile-steer verify'"
    with pytest.raises(ArtifactError, match=rf"not a parity report of this version \({lacking}"):
        Parity.load(tmp_path / PARITY)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3e38, r"computes NaN or infinity at .* held-out tokens, first in {module};"),
        (math.inf, r"NaN or infinity, in float32, in {module}\.weight"),
    ],
)
def test_an_artifact_that_has_overflowed_is_refused(case: VerifierCase, value: float, problem: str) -> None:
    folder = case.merged("overflown")
    weights = load_file(folder / "model.safetensors")
    weights[f"{case.module}.weight"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Provenance.read(folder).write(folder)
    with pytest.raises(ArtifactError, match=problem.format(module=case.module)):
        case.parity_of(folder)


# ------------------------------------------------------------------------------------------- gates


def test_the_margin_is_a_gate_and_the_score_where_the_prompts_suffice(exact: Parity) -> None:
    margin = exact.behaviour.margin
    assert margin is not None
    off = replace(margin, difference=0.4, high=0.9, p=0.6, equivalent=False)
    assert judged(with_behaviour(exact, margin=off), GATES).reasons == [str(off)]
    few = equivalence("score", np.array([0.0, 1.0, 0.0, 0.0]), 0.05)
    assert not few.enough and judged(with_behaviour(exact, score=few), GATES).reasons == []
    many = equivalence("score", np.full(60, 0.2), 0.05)
    assert many.enough and judged(with_behaviour(exact, score=many), GATES).reasons == [str(many)]


def test_a_rate_fails_where_its_whole_interval_is_below_the_gate(exact: Parity) -> None:
    near = replace(exact, exact=False)
    chance, fault = (Interval(0.941, 0.92, high) for high in (0.955, 0.949))
    assert judged(with_divergence(near, top1=0.941, top1_interval=chance), GATES).reasons == []
    off = with_divergence(near, top1=0.941, top1_interval=fault)
    assert judged(off, GATES).reasons == ["top-1 agreement 94.10% [92.00%, 94.90%]; at least 95.00%"]
    older = with_divergence(near, top1=0.941, top1_interval=None)
    assert judged(older, GATES).reasons == ["top-1 agreement 94.10%; at least 95.00%"]


def test_more_repetition_than_steered_is_a_gate_less_is_not(exact: Parity) -> None:
    assert exact.behaviour.repetition.difference == 0.0
    loops = np.array([0.3, 0.5, 0.2, 0.6, 0.4, 0.3])
    more, less = (equivalence("repetition", sign * loops, GATES.repetition_margin) for sign in (1, -1))
    (reason,) = judged(with_behaviour(exact, repetition=more, repetition_compiled=0.5), GATES).reasons
    assert reason.startswith("it repeats itself more than the steered model: 0.50 of its 3-grams, steered ")
    assert "repetition +0.383 [" in reason
    assert judged(with_behaviour(exact, repetition=less), GATES).reasons == []
    # By chance more in a few answers of a sound artifact: the interval reaches below the margin.
    some = equivalence("repetition", np.array([0.4, -0.1, 0.3, -0.2, 0.0, 0.1]), GATES.repetition_margin)
    assert (
        some.difference > GATES.repetition_margin
        and judged(with_behaviour(exact, repetition=some), GATES).reasons == []
    )


def test_an_exact_compile_is_exact_at_the_prompts_positions_too(exact: Parity) -> None:
    assert exact.divergence.kl_prompt < 1e-9
    off = with_divergence(exact, kl_prompt=2e-6)
    assert judged(off, GATES).reasons == ["KL 2.00e-06 nats a token at the prompts' positions; at most 1.00e-06"]
    assert judged(replace(off, exact=False), GATES).reasons == [], "other backends are fitted to the responses"
    rounded = Rounding(1e-9, 1e-9, 1.0, 1e-9, 0.0, 1.0, 0, 0.0)
    assert judged(replace(off, rounding=rounded), GATES).reasons == [], "what rounding costs there is not measured"


def test_a_large_hidden_error_or_rms_of_a_gated_mean_is_shown_and_no_reason(exact: Parity) -> None:
    """Neither has a bound that sound artifacts were measured against: a compile that passes has 9 % of hidden error."""
    assert judged(with_divergence(exact, hidden_error=0.5, kl_rms=1.0), GATES).reasons == []
