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
from compile_steer.models.logprobs import final_states, logprob_margins
from compile_steer.models.tokens import Encoded
from compile_steer.recipe import Recipe
from compile_steer.report.terminal import print_parities
from compile_steer.stats import (
    equivalence,
)
from compile_steer.steering.hooks import steered
from compile_steer.verify.parity import Parity, judge
from compile_steer.verify.reference import Reference
from tests.helpers.verification import RecordedNotes, VerifierCase, behaviour, recipe


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def exact(scene: VerifierCase) -> Parity:
    return scene.parity_of(scene.merged())


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
    half = logprob_margins(scene.base, pairs, scene.program.scaled(0.5))
    assert not equivalence("log-likelihood margin", half - wanted, scene.reference.margins.contrast).equivalent


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
    assert (first.measure, second.measure, third.measure) == ("log-likelihood margin", "score", "score by prompt set")
    assert second.spread == pytest.approx(math.sqrt(2) * found.steered_behaving.scores.std(ddof=1))
    assert second.available == 12 and first.effect == found.margins.contrast and third.effect == found.margins.by_kind


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
