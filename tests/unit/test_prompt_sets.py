"""Prompt sets: what they are made of, and what the verifier measures on them, read and answered freely."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from compile_steer.data.wordings import WORDINGS
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.report.terminal import details, print_parities
from compile_steer.steering.hooks import RESPONSE
from compile_steer.verification.gates import judged
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.parity import Check, Parity, Rounding
from compile_steer.verification.prompt_sets import PromptSets, build_prompts, same_until
from tests.helpers.tiny import loaded
from tests.helpers.verification import VerifierCase, behaviour, recipe

SETTINGS: dict[str, Any] = {"prompts_per_set": 2, "long": 0, "free_tokens": 5}
OPTIONS = recipe(**SETTINGS).verify
NAMES = ["held-out", "off-topic", "multi-turn"]


def prompt_sets(case: VerifierCase, scored: bool = True) -> PromptSets:
    score = recipe().validate_.score.bind(case.base, behaviour()) if scored else None
    return PromptSets(case.base, case.program, behaviour(), OPTIONS, 5, score)


def test_each_set_has_the_prompts_that_its_name_says(case: VerifierCase) -> None:
    sets, remarks = build_prompts(case.base, behaviour(), OPTIONS)
    encoded = {name: [prompt.encoded for prompt in prompts] for name, prompts in sets.items()}
    assert all(one.plain == text.prompt for one, text in zip(sets["multi-turn"], behaviour().heldout, strict=False))
    assert remarks == [] and list(encoded) == NAMES
    assert [len(prompts) for prompts in encoded.values()] == [2, 2, 2]
    assert all(len(one.ids) == one.n_prompt for prompts in encoded.values() for one in prompts), "no answers yet"
    assert all(len(one.earlier) == 1 and RESPONSE in one.roles for one in encoded["multi-turn"])


def test_the_recipe_s_own_conversations_come_first(case: VerifierCase) -> None:
    own = Text("w9 w9", history=(("w10", "w11"), ("w12", "w13")))
    sets, _remarks = build_prompts(case.base, behaviour(heldout=(*behaviour().heldout, own)), OPTIONS)
    assert [len(one.encoded.earlier) for one in sets["multi-turn"]] == [2, 1]


def test_remarks_name_the_sets_that_the_model_cannot_have(case: VerifierCase) -> None:
    plain = loaded("llama")  # no chat template, 64 positions
    sets, remarks = build_prompts(plain, behaviour(), OPTIONS)
    assert list(sets) == ["held-out", "off-topic"]
    (remark,) = remarks
    assert "several turns needs a model with a chat template" in remark


@pytest.mark.parametrize(
    ("tokens", "fraction"),
    [([1, 2, 3, 4], 1.0), ([1, 2, 9, 4], 0.5), ([7, 2, 3, 4], 0.0), ([1, 2, 3], 0.75), ([1, 2, 3, 4, 5], 1.0)],
)
def test_answers_are_the_same_up_to_the_first_token_that_differs(tokens: list[int], fraction: float) -> None:
    expected, answer = (Encoded((8, 8, *ids), 2) for ids in ([1, 2, 3, 4], tokens))
    assert same_until([expected], [answer]) == fraction
    assert same_until([expected, expected], [answer, expected]) == pytest.approx((fraction + 1) / 2)


def test_the_base_itself_leaves_all_of_the_divergence(case: VerifierCase) -> None:
    sets = prompt_sets(case)
    for one in (measured := sets.compare(case.base)):
        assert one.kl_remaining == pytest.approx(1.0)
        assert one.greedy.same == one.greedy.same_base and one.sampled.same == one.sampled.same_base
    assert min(one.greedy.same_base for one in measured) < 1


def test_free_answers_are_scored_as_the_recipe_says(case: VerifierCase) -> None:
    sets, adapter = prompt_sets(case), reload(case.adapter("scored"), case.base)
    measured = sets.compare(adapter)
    expected = {}
    prompts = [prompt for of_set in sets.prompts.values() for prompt in of_set]
    each = [0.0] * len(prompts) + [1.0] * len(prompts)
    written = continue_prompts(adapter, 2 * prompts, max_new_tokens=5, temperature=each, seed=5)
    for decoding, answers in zip(("greedy", "sampled"), np.array_split(np.arange(len(written)), 2), strict=True):
        texts = [re.sub(r"w4\b", "", response_text(adapter, written[one])) for one in answers]
        expected[decoding] = np.array([float("w4" in text) for text in texts])
    assert 0 < expected["sampled"].mean() < 1, "or it would show nothing"
    assert [one.greedy.score for one in measured] == [expected["greedy"][2 * n : 2 * n + 2].mean() for n in range(3)]
    assert [one.sampled.score for one in measured] == [expected["sampled"][2 * n : 2 * n + 2].mean() for n in range(3)]


def test_a_scorer_of_the_data_s_own_prompts_scores_no_other(case: VerifierCase) -> None:
    sets = prompt_sets(case, scored=False)
    assert sets.compare(case.base)[0].greedy.score is None


def test_an_exact_compile_answers_as_the_steered_model_on_every_set(exact: Parity, tmp_path: Path) -> None:
    assert exact.passed and [one.name for one in exact.prompt_sets] == NAMES
    for one in exact.prompt_sets:
        assert one.kl < 1e-9 and one.greedy.same == one.sampled.same == 1.0
    exact.save(tmp_path / "parity.json")
    assert Parity.load(tmp_path / "parity.json") == exact


def test_an_exact_compile_that_is_off_on_one_set_fails(exact: Parity) -> None:
    off = [replace(one, kl=1e-3) if one.name == "multi-turn" else one for one in exact.prompt_sets]
    wrong, gates = replace(exact, prompt_sets=off), OPTIONS.gates
    assert judged(wrong, gates).reasons == ["KL 1.00e-03 nats a token on multi-turn prompts; at most 1.00e-06"]
    assert judged(replace(wrong, exact=False), gates).reasons == [], "a remaining KL of few tokens is reported only"
    rounded = Rounding(1e-9, 1e-9, 1.0, 1e-9, 0.0, 1.0, 0, 0.0)
    assert judged(replace(wrong, rounding=rounded), gates).reasons == [], "what rounding costs there is not measured"


def test_other_wordings_are_gated_where_the_compile_is_exact_and_named_where_it_is_not(exact: Parity) -> None:
    assert [wording.name for wording in exact.wordings] == [wording.name for wording in WORDINGS]
    assert all(wording.kl < 1e-9 and wording.n_texts == 2 and wording.n_tokens > 2 for wording in exact.wordings)
    off = [replace(one, kl=1e-3, kl_remaining=0.03) if one.name == "role" else one for one in exact.wordings]
    wrong, gates = replace(exact, wordings=off), OPTIONS.gates
    assert judged(wrong, gates).reasons == ["KL 1.00e-03 nats a token (wording: role); at most 1.00e-06"]
    approximate = judged(replace(wrong, exact=False), gates)
    assert approximate.passed and "KL in other wordings" in approximate.verdict
    (check,) = [check for check in approximate.unchecked if "wording" in check.name]
    assert check.text == f"remaining KL above 2%, but on about {off[2].n_tokens} tokens each: role 3.00%"
    assert ("remaining KL by wording", "please tell me 0.00%") in [(label, text[:20]) for label, text in details(exact)]


def test_the_base_leaves_all_of_the_divergence_in_every_wording(case: VerifierCase) -> None:
    sets = prompt_sets(case)
    assert all(wording.kl_remaining == pytest.approx(1.0) for wording in sets.compare_wordings(case.base))
    assert all(wording.kl == 0 for wording in sets.compare_wordings(None))


def test_the_terminal_shows_the_prompt_sets(exact: Parity) -> None:
    stream = StringIO()
    print_parities(
        Console(file=stream, width=300),
        [replace(exact, checks=[Check("prompt sets", "not checked", "no turns")])],
    )
    first = exact.prompt_sets[0]
    assert f"100%, 100% (0.00%); {first.greedy.score:.2f}, {first.sampled.score:.2f}" in stream.getvalue()
    assert f"-; {first.greedy.score_steered:.2f}, {first.sampled.score_steered:.2f}" in stream.getvalue()
    assert f"multi-turn, {exact.prompt_sets[-1].prompt_tokens} tokens" in stream.getvalue()
    assert stream.getvalue().startswith("bias merged-fp32: passed; not checked: prompt sets\n")
    assert "not checked: prompt sets: no turns" in stream.getvalue()


@pytest.mark.parametrize(
    "change", [{"prompts_per_set": 0}, {"samples_per_prompt": 0}, {"long": -1}, {"long_tokens": 15}, {"free_tokens": 3}]
)
def test_settings_that_measure_nothing_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than or equal"):
        VerifyOptions(**change)
