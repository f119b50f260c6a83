"""Other wordings: what is made of a prompt, and the effect there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compile_steer.data.wordings import WORDINGS, worded
from compile_steer.models.logprobs import answer_logprobs, final_states, margins
from compile_steer.models.text import Text
from compile_steer.stats import Interval
from compile_steer.steering.hooks import RESPONSE
from compile_steer.validation.report import WordingEffect
from compile_steer.validation.verdict import decide
from compile_steer.validation.wordings import measure_wordings
from tests.helpers.tiny import loaded
from tests.helpers.validation import behaviour, chat_model, context, options, program_at, usual_validation
from tests.unit.test_verdict import good


def test_every_wording_holds_the_prompt_and_what_its_name_says() -> None:
    model, text = chat_model(), Text("w9 w10", "w11 w12")
    by_name, remarks = worded(model, [text], behaviour().neutral)
    assert list(by_name) == [wording.name for wording in WORDINGS] and remarks == []
    as_given = model.tokenizer("w9 w10", add_special_tokens=False)["input_ids"]
    for name, (encoded,) in by_name.items():
        prompt, response = (
            list(encoded.ids[: encoded.n_prompt]),
            model.tokenizer.decode(list(encoded.ids[encoded.n_prompt :])),
        )
        assert any(prompt[n : n + 2] == as_given for n in range(len(prompt))), name
        assert response.split() == ["w11", "w12"], name
    assert list(by_name["no chat template"][0].ids[: by_name["no chat template"][0].n_prompt]) == as_given
    assert len(by_name["history"][0].earlier) == 3 and RESPONSE in by_name["history"][0].roles[:-2]


def test_wordings_that_a_model_cannot_have_are_named() -> None:
    by_name, remarks = worded(loaded("llama"), [Text("w9", "w10")], behaviour().neutral)
    assert "no chat template" not in by_name and "role" in by_name
    starts = [remark.partition(" (")[0] for remark in remarks]
    assert starts == ["not measured in the wording system prompt", "not measured in the wording history"]


def test_the_effect_in_each_wording_is_that_of_the_same_pairs_measured_alone() -> None:
    program, pairs = program_at(2, 1.6), behaviour().test[:2]
    effects, remarks = measure_wordings(context(), program, 2)
    assert remarks == [] and len(effects) == len(WORDINGS)
    sides = [Text(pair.prompt, pair.positive.response) for pair in pairs]
    sides += [Text(pair.prompt, pair.negative.response) for pair in pairs]
    by_name, _remarks = worded(chat_model(), sides, behaviour().neutral)
    for effect in effects:
        encoded = by_name[effect.name]
        steered, base = (
            answer_logprobs(chat_model().model, encoded, final_states(chat_model(), encoded, setting))
            / [len(text.ids) - text.n_prompt for text in encoded]
            for setting in (program, None)
        )
        change = margins(steered - base)
        assert effect.effect.value == pytest.approx(change.mean(), abs=1e-5) and effect.n == 2
    assert measure_wordings(context(), program, 0) == ([], [])


def test_the_verdict_says_where_the_effect_does_not_hold() -> None:
    some = WordingEffect("role", Interval(0.3, 0.1, 0.5), 0.5, 6)
    lost = replace(some, name="system prompt", effect=Interval(0.2, -0.1, 0.4))
    report = replace(good(), wordings=[some, lost])
    assert report.headline.endswith("; less than half of the effect with: system prompt")
    assert decide(report, options())[0] == "pass", "it is told, and changes no verdict"
    assert [wording.name for wording in usual_validation().report.wordings] == [wording.name for wording in WORDINGS]
