"""Contexts of many lengths: how texts are joined to them, and what the verifier reads behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compile_steer.data.contexts import in_contexts, long_context
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.stats import Interval
from compile_steer.steering.hooks import RESPONSE
from compile_steer.verification.gates import judged
from compile_steer.verification.parity import Parity
from compile_steer.verification.prompt_report import ContextLength
from tests.helpers.tiny import loaded
from tests.helpers.verification import VerifierCase, behaviour, recipe, words

SETTINGS: dict[str, Any] = {"prompts_per_set": 2, "free_tokens": 4, "long": 2, "long_tokens": 120}
GATES = recipe().verify.gates
TEXTS = [Text(words(n, 4), words(n + 50, 5)) for n in range(40)]


def joined(model: LoadedModel, longest: int) -> tuple[list[Encoded], list[Encoded]]:
    alone = [encode(model.tokenizer, text) for text in TEXTS]
    return alone, in_contexts(model, TEXTS, alone, longest, 3)


def test_half_of_the_texts_stay_alone_and_the_others_are_in_contexts_of_many_lengths(case: VerifierCase) -> None:
    alone, contexts = joined(case.base, 128)
    single = [n for n, one in enumerate(alone) if one in contexts]
    text = " ".join(case.base.tokenizer.decode(list(one.ids)) for one in contexts)
    assert 20 <= len(single) < 30 and all(1 <= text.count(one.response) <= 3 for one in TEXTS)
    assert sum(text.count(one.response) == 3 for one in TEXTS) > 10, "in three contexts with others around"
    lengths = [len(one.ids) for one in contexts]
    assert max(lengths) <= 128 and sum(length > 112 for length in lengths) >= 3, (
        "each round has one as long as it may be"
    )
    assert any(32 < length < 64 for length in lengths)
    turns, documents = [one for one in contexts if one.earlier], [one for one in contexts if not one.earlier]
    assert turns and any(len(one.ids) > 32 for one in documents)
    for one in turns:
        spans = [one.ids[start:stop] for start, stop in one.earlier]
        own = {case.base.tokenizer.decode(list(span)) for span in spans}
        assert own <= {text.response for text in TEXTS} and one.roles.count(RESPONSE) == 5 * (len(spans) + 1)
    assert joined(case.base, 128)[1] == contexts, "the same seed, the same texts"
    assert sorted(one.ids for one in joined(case.base, 16)[1]) == sorted(one.ids for one in alone)


def test_every_text_may_stay_alone_too(case: VerifierCase) -> None:
    alone, contexts = joined(case.base, 128)
    more = in_contexts(case.base, TEXTS, alone, 128, 3, every_alone=True)
    assert all(one in more for one in alone)
    longer = [one for one in contexts if one not in alone]
    assert longer and sorted(one.ids for one in more if one not in alone) == sorted(one.ids for one in longer)


def test_without_conversations_all_but_the_last_are_documents_and_the_model_has_room() -> None:
    plain = loaded("llama")  # no chat template, 64 positions
    _alone, contexts = joined(plain, 2048)
    assert not any(one.earlier for one in contexts) and 32 < max(len(one.ids) for one in contexts) <= 64


def test_a_long_context_is_filled_with_documents_before_its_prompts(case: VerifierCase) -> None:
    documents = behaviour().neutral
    context = long_context(case.base, TEXTS[:4], documents, 120, 1)
    assert 90 < len(context.ids) <= 120 and len(context.earlier) == 3
    text = case.base.tokenizer.decode(list(context.ids))
    assert all(text.count(one.response) == 1 for one in TEXTS[:4])
    assert sum(one.response in text for one in documents) >= 2
    assert len(long_context(case.base, TEXTS, documents, 120, 1).ids) <= 120, "what does not fit is left out"
    assert long_context(case.base, TEXTS[:4], documents, 120, 2) != context


# ------------------------------------------------------------------------------------------- verifier


@pytest.fixture(scope="module")
def approximate(case: VerifierCase) -> Parity:
    return case.parity_of(case.adapter())


def test_figures_are_those_of_the_positions(case: VerifierCase, approximate: Parity) -> None:
    adapter, model = reload(case.folder / "adapter", case.base), case.base.model
    kls: dict[int, list[float]] = {}
    for texts in ([*case.reference.contexts.texts], case.reference.heldout):
        for text in texts:
            p, q = (
                final_states(one, [text], program).response
                for one, program in ((case.base, case.program), (adapter, None))
            )
            before = [n for n, role in enumerate(text.roles) if role == RESPONSE]
            for position, kl in zip(before, divergence(model, p, adapter.model, q).kl, strict=True):
                kls.setdefault(position, []).append(float(kl))
    assert [one.start for one in approximate.contexts] == [0, 64]
    for one in approximate.contexts:
        own = [kl for position, found in kls.items() if one.start <= position < one.stop for kl in found]
        assert one.n_tokens == len(own) and one.kl == pytest.approx(sum(own) / len(own), rel=1e-3)
        assert one.kl_remaining.value == pytest.approx(one.kl / one.kl_base)
        assert one.kl_remaining.low < one.kl_remaining.value < one.kl_remaining.high
    assert max(kls) >= 64


def test_an_exact_compile_is_exact_behind_every_context(exact: Parity) -> None:
    assert exact.passed and len(exact.contexts) == 2 and max(one.kl for one in exact.contexts) < 1e-9
    wrong = replace(exact, contexts=[exact.contexts[0], replace(exact.contexts[1], kl=2e-6)])
    (reason,) = judged(wrong, GATES).reasons
    assert reason == f"KL 2.00e-06 nats a token behind 64 to {exact.contexts[1].stop} tokens; at most 1.00e-06"


def test_the_worst_length_is_gated_where_its_whole_interval_is_above(exact: Parity) -> None:
    near = replace(exact, exact=False)

    def with_remaining(*intervals: Interval, responses: int = 9) -> Parity:
        lengths = [
            ContextLength(100 * n, 100 * n + 100, 90, responses, 0.03, 1.0, interval, 0.9)
            for n, interval in enumerate(intervals)
        ]
        return judged(replace(near, contexts=lengths), GATES)

    good, chance, fault = Interval(0.01, 0.008, 0.012), Interval(0.03, 0.019, 0.05), Interval(0.03, 0.021, 0.05)
    assert with_remaining(good, chance).reasons == []
    (reason,) = with_remaining(good, fault, chance).reasons
    assert reason == "remaining KL by tokens of context, 100 to 200: 3.00% [2.10%, 5.00%] of 9 answers; at most 2.00%"
    unknown = [check.text for check in with_remaining(fault, responses=3).unchecked if check.name == "contexts"]
    assert unknown == ["no answers were read behind long contexts (verify.long)"]


def test_a_model_without_room_for_the_shortest_context_is_told(case: VerifierCase) -> None:
    small = VerifierCase(case.folder, case.base, case.program, {**case.verify, "long_tokens": 40})
    assert small.reference.contexts.texts == []
    (remark,) = small.reference.contexts.remarks
    assert remark.startswith(
        "no contexts of 64 tokens or more were verified: at most 40 are possible (verify.long_tokens 40;"
    )
    parity = small.parity_of(case.merged("small"))
    assert parity.contexts == [] and remark in parity.remarks
    assert {"contexts", "prompts"} <= {check.name for check in parity.unchecked}
