"""The tests of equivalence against a hand computation and by simulation, and what the judge makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from compile_steer.artifacts.provenance import PARITY, Provenance
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.divergence import bootstrap_ratio
from compile_steer.models.observe import contrast, final_states
from compile_steer.models.tokens import Encoded
from compile_steer.recipe import Recipe
from compile_steer.report.terminal import print_parities
from compile_steer.steering.hooks import steered
from compile_steer.verify.equivalence import LEVEL, POWER, equivalence, needed, planned
from compile_steer.verify.parity import Parity, judge
from compile_steer.verify.reference import Reference
from tests.helpers.verification import RecordedNotes, VerifierCase, behaviour, recipe


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def exact(scene: VerifierCase) -> Parity:
    return scene.parity_of(scene.merged())


def normal(seed: int, runs: int, n: int, mean: float, spread: float) -> np.ndarray:
    return mean + spread * np.random.default_rng(seed).standard_normal((runs, n))


# --------------------------------------------------------------------------------------------- TOST


def test_it_is_the_hand_computation() -> None:
    # mean 0.3, sd sqrt(0.5 / 4), n 5: standard error 0.158114; t of 4 degrees at 0.95 is 2.131847
    found = equivalence("contrast", np.array([0.1, 0.8, -0.1, 0.6, 0.1]), 0.7)
    assert found.difference == pytest.approx(0.3) and found.n == 5
    error = math.sqrt(0.58 / 4) / math.sqrt(5)
    assert found.low == pytest.approx(0.3 - 2.131847 * error, abs=1e-5)
    assert found.high == pytest.approx(0.3 + 2.131847 * error, abs=1e-5)
    # The upper test is the harder: t = (0.7 - 0.3) / 0.170294 = 2.34888, one-sided p of 4 degrees 0.03930
    assert found.p == pytest.approx(0.0393, abs=2e-4)
    assert found.equivalent and found.high < 0.7


@pytest.mark.parametrize("margin", [0.05, 0.3, 0.45, 0.66, 0.67, 0.9])
def test_it_passes_exactly_where_the_interval_lies_inside_the_margin(margin: float) -> None:
    found = equivalence("score", np.array([0.1, 0.8, -0.1, 0.6, 0.1]), margin)
    assert found.equivalent == (-margin < found.low and found.high < margin)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_difference_of_the_margin_is_called_equivalent_at_most_once_in_twenty(sign: float) -> None:
    values = normal(0, 500, 12, sign * 0.2, 0.15)
    rate = float(np.mean([equivalence("contrast", one, 0.2).equivalent for one in values]))
    assert rate <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 500)


@pytest.mark.parametrize(("spread", "margin"), [(0.3, 0.2), (0.5, 0.1), (0.05, 0.2)])
def test_the_number_that_is_needed_has_the_power_that_is_said(spread: float, margin: float) -> None:
    count = needed(spread, margin)
    passed = [equivalence("score", one, margin).equivalent for one in normal(1, 400, count, 0.0, spread)]
    assert np.mean(passed) >= POWER - 3 * math.sqrt(POWER * (1 - POWER) / 400)
    if count > 2:
        fewer = max(2, count // 2)
        assert (
            np.mean([equivalence("score", one, margin).equivalent for one in normal(2, 100, fewer, 0.0, spread)])
            < POWER
        )


def test_unrelated_answers_need_the_thousands_that_are_known() -> None:
    # Two answers, each 0 or 1 by a coin: (1.645 + 1.960)^2 x 0.5 / 0.05^2
    assert needed(math.sqrt(0.5), 0.05) == pytest.approx(2599, abs=4)
    assert needed(0.0, 0.05) == 2


def test_differences_that_are_all_the_same_need_no_interval() -> None:
    same, other = (equivalence("contrast", np.full(7, value), 0.05) for value in (0.01, 0.1))
    assert (same.low, same.high, same.p, same.equivalent) == (0.01, 0.01, 0.0, True)
    assert (other.p, other.equivalent, other.enough) == (1.0, False, True)


def test_of_a_few_answers_that_are_all_as_good_nothing_is_shown() -> None:
    """Were one prompt in twenty another, 58 would show none more often than once in twenty."""
    few, enough = (equivalence("score", np.zeros(n), 0.05) for n in (58, 59))
    assert 0.95**59 < 0.05 < 0.95**58 and few.needed == enough.needed == 59
    assert not few.equivalent and few.p == pytest.approx(0.95**58) and enough.equivalent
    assert str(few).endswith("not shown: needs 59 prompts, there are 58")
    assert planned("score", 0.05, 0.0, 12, "all the same").needed == 59
    assert planned("contrast", 0.05, 0.0, 12, "all the same").needed == 2
    assert equivalence("score", np.zeros(3), 1.0).equivalent


@pytest.mark.parametrize("values", [[], [0.1], [0.1, math.nan, 0.2], [math.inf, 0.0]])
def test_what_cannot_be_tested_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="needed: two or more, all finite"):
        equivalence("score", np.array(values), 0.1)


@pytest.mark.parametrize(("spread", "margin"), [(0.1, 0.0), (0.1, -1.0), (-0.1, 1.0), (math.nan, 1.0), (0.1, math.inf)])
def test_no_margin_or_no_spread_is_refused(spread: float, margin: float) -> None:
    with pytest.raises(ValueError, match="needed: a margin above 0"):
        needed(spread, margin)


def test_what_is_said() -> None:
    few = equivalence("score", np.array([0.0, 1.0, 0.0, 0.0]), 0.05)
    assert f"not shown: needs {few.needed:,} prompts, there are 4" in str(few)
    assert str(equivalence("score", np.array([0.9, 0.2, 0.8, 0.3]), 0.05)).endswith("of +-0.05, not equivalent")
    assert str(equivalence("contrast", np.full(3, 0.01), 0.08)) == (
        "contrast +0.010 [+0.010, +0.010] of +-0.08 nats/token, equivalent"
    )
    assert "needs 2,601 test prompts for 95% power; there are 10, too few (a coin)" in str(
        planned("score", 0.05, math.sqrt(0.5), 10, "a coin")
    )


# --------------------------------------------------------------------------- intervals over the texts


def test_tokens_of_one_text_do_not_count_as_so_many_samples() -> None:
    kl = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.4, 0.3]).repeat_interleave(50)
    texts, ones = torch.arange(6).repeat_interleave(50), torch.ones(300)
    by_text = bootstrap_ratio(kl, ones, texts, seed=0)
    by_token = bootstrap_ratio(kl, ones, torch.arange(300), seed=0)
    assert by_text.value == by_token.value == pytest.approx(0.4)
    assert by_text.high - by_text.low > 4 * (by_token.high - by_token.low)


def test_long_texts_weigh_what_they_have_in_tokens() -> None:
    found = bootstrap_ratio(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([5, 5, 9]), seed=0
    )
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("below", [0.0, math.nan])
def test_a_ratio_without_a_divisor_is_refused(below: float) -> None:
    with pytest.raises(ValueError, match="no finite ratio"):
        bootstrap_ratio(torch.ones(4), torch.full((4,), below), torch.arange(4), seed=0)


def test_states_know_their_texts(scene: VerifierCase) -> None:
    texts = [Encoded((9, 8, 7, 6, 10), 2), Encoded((11, 12, 13), 2), Encoded((9, 14, 10, 11), 1)]
    states = final_states(scene.base, texts)
    for at, one in enumerate(texts):
        alone = final_states(scene.base, [one])
        assert torch.allclose(states.response[states.texts == at], alone.response, atol=1e-5)


# ---------------------------------------------------------------------------------------- the judge


def test_an_exact_compile_is_equivalent_and_its_report_comes_back(
    scene: VerifierCase, exact: Parity, tmp_path: Path
) -> None:
    assert exact.contrast is not None
    assert exact.contrast.equivalent and exact.score.difference == 0.0 and not exact.score.enough
    assert exact.reasons == [] and exact.passed
    assert 0 <= exact.kl_low <= exact.kl_per_token <= exact.kl_high < 1e-6
    assert exact.kl_share == pytest.approx(exact.kl_per_token / exact.kl_base)
    assert exact.n_texts == 8
    exact.save(tmp_path / PARITY)
    assert Parity.load(tmp_path / PARITY) == exact


def test_the_margins_are_shares_of_the_effect(scene: VerifierCase, exact: Parity) -> None:
    reference, pairs = scene.reference, len(scene.reference.base_behaving.contrast)
    effect = abs(float((reference.steered_behaving.contrast - reference.base_behaving.contrast).mean()))
    assert exact.contrast is not None
    assert exact.contrast.margin == pytest.approx(0.2 * effect) and exact.contrast.n == pairs == 12
    moved = abs(float((reference.steered_behaving.scores - reference.base_behaving.scores).mean()))
    assert exact.score.margin == pytest.approx(min(0.05, 0.2 * moved) or 0.05)


def test_half_the_dose_is_not_equivalent(scene: VerifierCase) -> None:
    from compile_steer.models.logprobs import encode_pairs

    pairs = encode_pairs(scene.base, behaviour().test)
    wanted = scene.reference.steered_behaving.contrast
    half = contrast(scene.base, pairs, scene.program.scaled(0.5))
    assert not equivalence("contrast", half - wanted, scene.reference.margins.contrast).equivalent


def test_the_contrast_is_a_gate_and_the_score_where_the_prompts_suffice(exact: Parity) -> None:
    gates = recipe().verify.gates
    assert exact.contrast is not None
    off = replace(exact.contrast, difference=0.4, high=0.9, p=0.6, equivalent=False)
    assert judge(replace(exact, contrast=off), gates) == [str(off)]
    few = equivalence("score", np.array([0.0, 1.0, 0.0, 0.0]), 0.05)
    assert not few.enough and judge(replace(exact, score=few), gates) == []
    many = equivalence("score", np.full(60, 0.2), 0.05)
    assert many.enough and judge(replace(exact, score=many), gates) == [str(many)]


def test_what_can_be_shown_is_said_before_any_artifact_is_seen(scene: VerifierCase) -> None:
    notes = RecordedNotes()
    found = Reference(recipe(), scene.base, scene.program, behaviour(), notes)
    assert notes.texts == [str(one) for one in found.planned()]
    first, second, third = found.planned()
    assert (first.what, second.what, third.what) == ("contrast", "score", "score by kind")
    assert second.spread == pytest.approx(math.sqrt(2) * found.steered_behaving.scores.std(ddof=1))
    assert second.there == 12 and first.margin == found.margins.contrast and third.margin == found.margins.by_kind


@pytest.mark.parametrize("count", [0, 1])
def test_one_test_pair_shows_nothing(scene: VerifierCase, count: int) -> None:
    with pytest.raises(RecipeError, match=f"data.test has {count} pairs; needed: two or more"):
        _reference(scene, recipe(), behaviour(test=behaviour().test[:count]))


def test_a_program_that_does_nothing_is_not_compared_with(scene: VerifierCase) -> None:
    with pytest.raises(ArtifactError, match="changes nothing"):
        Reference(recipe(), scene.base, scene.program.scaled(0.0), behaviour(), Progress())


def test_a_base_that_is_steered_already_does_not_pass_unseen(scene: VerifierCase, exact: Parity) -> None:
    with steered(scene.base.model, scene.program):
        reference = _reference(scene, recipe(), behaviour())
    assert reference.base_divergence.mean != pytest.approx(exact.kl_base, rel=0.01)


def test_an_artifact_that_has_overflowed_is_refused(scene: VerifierCase) -> None:
    from safetensors.torch import load_file, save_file

    folder = scene.merged("overflown")
    weights = load_file(folder / "model.safetensors")
    weights[f"{scene.module}.weight"][3] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Provenance.read(folder).write(folder)
    with pytest.raises(
        ArtifactError, match=rf"computes NaN or infinity at .* held-out tokens, first in {scene.module};"
    ):
        scene.parity_of(folder)


def test_the_terminal_shows_the_tests_and_the_intervals(exact: Parity) -> None:
    stream = StringIO()
    print_parities(Console(file=stream, width=250), [exact])
    said = stream.getvalue()
    assert "share [95 %]" in said and str(exact.contrast) in said and str(exact.score) in said


def test_a_report_of_an_older_judge_is_refused_with_what_it_lacks(exact: Parity, tmp_path: Path) -> None:
    content = asdict(exact)
    for name in ("score", "kl_low"):
        del content[name]
    (tmp_path / PARITY).write_text(json.dumps(content))
    with pytest.raises(
        ArtifactError, match="not a parity report of this version: it lacks kl_low, score.*'compile-steer verify'"
    ):
        Parity.load(tmp_path / PARITY)


def _reference(scene: VerifierCase, options: Recipe, data: Behaviour) -> Reference:
    return Reference(options, scene.base, scene.program, data, Progress())
