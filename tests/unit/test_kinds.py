"""Prompts of other kinds: what they are made of, and what the judge measures on them, read and answered freely."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from compile_steer.common.errors import RecipeError
from compile_steer.models.generate import continue_encoded, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.report.terminal import print_parities
from compile_steer.stats import equivalence
from compile_steer.steering.hooks import RESPONSE
from compile_steer.steering.program import Program
from compile_steer.verify.options import Verify
from compile_steer.verify.parity import judge
from compile_steer.verify.prompt_sets import Kinds, OnKind, _same, prompts_of
from tests.helpers.tiny import loaded
from tests.helpers.verification import VerifierCase, behaviour, recipe

OPTIONS: dict[str, Any] = {"kinds": 2, "long": 2, "long_tokens": 60, "free_tokens": 5}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    return VerifierCase.of(tmp_path_factory.mktemp("scene"), **OPTIONS)


def kinds(scene: VerifierCase, base: LoadedModel | None = None) -> Kinds:
    score = recipe().validate_.score.bind(scene.base, behaviour())
    return Kinds(base or scene.base, scene.program, behaviour(), recipe(**OPTIONS).verify, 5, score)


def test_each_kind_is_what_it_is_called(scene: VerifierCase) -> None:
    asked, remarks = prompts_of(scene.base, behaviour(), recipe(**OPTIONS).verify)
    found = {kind: [one.encoded for one in some] for kind, some in asked.items()}
    assert all(one.plain == text.prompt for one, text in zip(asked["multi-turn"], behaviour().heldout, strict=False))
    assert asked["long"][0].plain.endswith(f"\n\n{behaviour().heldout[0].prompt}")
    assert remarks == [] and list(found) == ["held-out", "off-topic", "multi-turn", "long"]
    assert [len(prompts) for prompts in found.values()] == [2, 2, 2, 2]
    assert all(len(one.ids) == one.n_prompt for prompts in found.values() for one in prompts), "nothing is answered yet"
    assert all(len(one.earlier) == 1 and RESPONSE in one.roles for one in found["multi-turn"])
    first, second = (one.ids for one in found["long"])
    assert min(len(first), len(second)) >= 60 and first != second
    shown = scene.base.tokenizer.decode(list(first))
    assert behaviour().neutral[0].response in shown and behaviour().heldout[0].prompt in shown
    assert behaviour().neutral[0].response not in scene.base.tokenizer.decode(list(second))[:60]


def test_the_recipe_s_own_conversations_come_first(scene: VerifierCase) -> None:
    own = Text("w9 w9", history=(("w10", "w11"), ("w12", "w13")))
    data = behaviour(heldout=(*behaviour().heldout, own))
    found, _remarks = prompts_of(scene.base, data, recipe(**OPTIONS).verify)
    assert [len(one.encoded.earlier) for one in found["multi-turn"]] == [2, 1]


def test_what_a_model_cannot_be_asked_is_said(scene: VerifierCase) -> None:
    plain = loaded("llama")  # no chat template, 64 positions
    found, remarks = prompts_of(plain, behaviour(), recipe(**OPTIONS).verify)
    assert list(found) == ["held-out", "off-topic"]
    assert "several turns needs a model with a chat template" in remarks[0]
    assert "no long prompts were judged" in remarks[1] and "the model has 64 positions" in remarks[1]
    few = recipe(**{**OPTIONS, "long": 0}).verify
    assert prompts_of(scene.base, behaviour(), few) == (
        {k: v for k, v in prompts_of(scene.base, behaviour(), recipe(**OPTIONS).verify)[0].items() if k != "long"},
        [],
    )
    with pytest.raises(RecipeError, match="data.neutral is empty"):
        prompts_of(scene.base, replace(behaviour(), neutral=()), recipe(**OPTIONS).verify)


@pytest.mark.parametrize(
    ("found", "share"),
    [([1, 2, 3, 4], 1.0), ([1, 2, 9, 4], 0.5), ([7, 2, 3, 4], 0.0), ([1, 2, 3], 0.75), ([1, 2, 3, 4, 5], 1.0)],
)
def test_an_answer_is_the_same_up_to_its_first_other_token(found: list[int], share: float) -> None:
    wanted, got = (Encoded((8, 8, *tokens), 2) for tokens in ([1, 2, 3, 4], found))
    assert _same([wanted], [got]) == share
    assert _same([wanted, wanted], [got, wanted]) == pytest.approx((share + 1) / 2)


def test_the_base_is_as_far_away_as_itself(scene: VerifierCase) -> None:
    both = kinds(scene)
    measured, scores = both.measure(scene.base)
    assert scores is not None and both.base_scores is not None and scores.tolist() == both.base_scores.tolist()
    for one in measured:
        assert one.share == pytest.approx(1.0)
        assert one.greedy.same == one.greedy.same_base and one.sampled.same == one.sampled.same_base
    assert min(one.greedy.same_base for one in measured) < 1


def test_the_figures_are_those_of_the_texts(scene: VerifierCase) -> None:
    one = kinds(scene)
    adapter = _reloaded(scene, scene.adapter("figures"))
    (found,) = [found for found in one.measure(adapter)[0] if found.kind == "long"]

    def answers(model: LoadedModel, program: Program | None) -> list[Encoded]:
        asked = [[prompt] for prompt in one.prompts["long"]]
        return [continue_encoded(model, p, program, max_new_tokens=5, temperature=1.0, seed=5)[0] for p in asked]

    wanted = answers(scene.base, scene.program)
    p, q, base = (
        final_states(model, wanted, program).response
        for model, program in ((scene.base, scene.program), (adapter, None), (scene.base, None))
    )
    kl, changed = (
        divergence(scene.base.model, p, model.model, other).mean for model, other in ((adapter, q), (scene.base, base))
    )
    # A prompt's keys and values are computed once and gone on from, which rounds otherwise.
    assert found.kl == pytest.approx(kl, rel=1e-3) and found.kl > 0
    assert found.share == pytest.approx(kl / changed, rel=1e-3) and found.n_tokens == len(p)
    assert found.sampled.same_base == _same(wanted, answers(scene.base, None))
    assert found.sampled.same == _same(wanted, answers(adapter, None))


def test_free_answers_are_scored_as_the_recipe_says(scene: VerifierCase) -> None:
    both, adapter = kinds(scene), _reloaded(scene, scene.adapter("scored"))
    found, scores = both.measure(adapter)
    prompts = [[prompt] for some in both.prompts.values() for prompt in some]
    wanted = {}
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        short = [prompt for kind, some in both.prompts.items() if kind != "long" for prompt in some]
        settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": temperature, "seed": 5}
        said = continue_encoded(adapter, short, **settings)
        said += [continue_encoded(adapter, [one], **settings)[0] for one in both.prompts["long"]]
        wanted[how] = np.array([float("w4" in re.sub(r"w4\b", "", response_text(adapter, one))) for one in said])
    assert len(prompts) == len(wanted["greedy"]) and scores is not None
    np.testing.assert_array_equal(scores, (wanted["greedy"] + wanted["sampled"]) / 2)
    assert 0 < scores.mean() < 1, "or it would show nothing"
    assert [one.greedy.score for one in found] == [wanted["greedy"][2 * at : 2 * at + 2].mean() for at in range(4)]
    assert [one.sampled.score for one in found] == [wanted["sampled"][2 * at : 2 * at + 2].mean() for at in range(4)]


def test_a_score_that_knows_the_data_s_prompts_alone_is_not_asked_about_others(scene: VerifierCase) -> None:
    nobody = Kinds(scene.base, scene.program, behaviour(), recipe(**OPTIONS).verify, 5, None)
    found, scores = nobody.measure(scene.base)
    assert scores is None and nobody.base_scores is None and found[0].greedy.score is None


def test_answers_of_every_kind_are_tested_for_equivalence(scene: VerifierCase) -> None:
    parity, gates = scene.parity_of(scene.merged("tested")), recipe().verify.gates
    assert parity.score_by_kind is not None and parity.score_by_kind.n == 8
    assert parity.score_by_kind.difference == 0 and not parity.score_by_kind.enough and parity.passed
    assert parity.score_by_kind in parity.tests
    other = equivalence("score by prompt set", np.array([-1.0, -1.0, -0.9, -1.0]), 0.05)
    reasons = judge(replace(parity, score_by_kind=replace(other, needed=4)), gates)
    assert len(reasons) == 1 and reasons[0].startswith("score by prompt set -0.975 [")
    assert judge(replace(parity, score_by_kind=replace(other, needed=5)), gates) == [], "too few to have shown it"
    assert any(one.measure == "score by prompt set" and one.available == 8 for one in scene.reference.planned())


def test_an_exact_compile_answers_as_the_steered_model_on_every_kind(scene: VerifierCase, tmp_path: Path) -> None:
    parity = scene.parity_of(scene.merged())
    assert parity.passed and [one.kind for one in parity.kinds] == ["held-out", "off-topic", "multi-turn", "long"]
    for one in parity.kinds:
        assert one.kl < 1e-9 and one.greedy.same == one.sampled.same == 1.0
    parity.save(tmp_path / "parity.json")
    assert type(parity).load(tmp_path / "parity.json") == parity


def test_an_exact_compile_that_is_off_on_one_kind_fails(scene: VerifierCase) -> None:
    parity, gates = scene.parity_of(scene.merged("again")), recipe().verify.gates
    off: list[OnKind] = [replace(one, kl=1e-3) if one.kind == "long" else one for one in parity.kinds]
    assert judge(replace(parity, kinds=off), gates) == ["KL 1.00e-03 nats a token on long prompts; at most 1.00e-06"]
    assert judge(replace(parity, kinds=off, exact=False), gates) == [], "a share of few tokens is reported, not judged"
    assert judge(replace(parity, kinds=off, noise_kl=1e-9), gates) == []


def test_the_terminal_says_it_by_kind(scene: VerifierCase) -> None:
    parity = scene.parity_of(scene.merged("shown"))
    stream = StringIO()
    print_parities(Console(file=stream, width=300), [replace(parity, remarks=["no long prompts"])])
    first = parity.kinds[0]
    assert f"100%, 100% (0.00%); {first.greedy.score:.2f}, {first.sampled.score:.2f}" in stream.getvalue()
    assert f"-; {first.greedy.score_steered:.2f}, {first.sampled.score_steered:.2f}" in stream.getvalue()
    assert f"long, {parity.kinds[-1].prompt_tokens} tokens" in stream.getvalue()
    assert "  no long prompts" in stream.getvalue()


@pytest.mark.parametrize("change", [{"kinds": 0}, {"long": -1}, {"long_tokens": 15}, {"free_tokens": 3}])
def test_settings_that_measure_nothing_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than or equal"):
        Verify(**change)


def _reloaded(scene: VerifierCase, folder: Path) -> LoadedModel:
    from compile_steer.models.reload import reload

    torch.manual_seed(0)
    return reload(folder, scene.base)
