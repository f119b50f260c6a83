"""KL divergences compared with torch's own, and log-probabilities of responses with a plain forward pass."""

from __future__ import annotations

from decimal import Decimal, localcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from compile_steer.models.forward import lm_head
from compile_steer.models.logprobs import (
    TokenDivergence,
    chunks,
    divergence,
    encode_pairs,
    final_states,
    kl_divergence,
    log_softmax,
    margins,
    mean_logprobs,
    token_logprobs,
)
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Encoded, encode, pad
from compile_steer.steering.hooks import RESPONSE, steered
from compile_steer.steering.program import Program
from tests.helpers.sharing import sharing_texts
from tests.helpers.tiny import HIDDEN, PAD_ID, VOCAB, intervention, loaded, program, texts


def random_logits(seed: int, n: int = 6, vocab: int = 41, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def test_kl_is_torch_s_own_and_has_a_direction() -> None:
    log_p, log_q = (random_logits(seed).double().log_softmax(dim=-1) for seed in (0, 1))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(kl_divergence(log_p, log_q), expected, rtol=1e-5)
    assert not torch.allclose(kl_divergence(log_q, log_p), expected, rtol=0.1)


@pytest.mark.parametrize("apart", [1e-6, 1e-4, 1e-2, 1.0, 30.0, 100.0])
def test_kl_keeps_its_digits_however_near_or_far_two_distributions_are(apart: float) -> None:
    """float32 logits against 60 digits; the farthest have tokens whose p is below all that float32 holds."""
    logits = random_logits(0, n=2, vocab=4000)
    others = logits + apart * random_logits(1, n=2, vocab=4000, scale=1.0)
    expected = []
    for p, q in zip(logits.tolist(), others.tolist(), strict=True):
        with localcontext(prec=60):
            p_of, q_of = ([Decimal(value).exp() for value in row] for row in (p, q))
            of_p, of_q = sum(p_of), sum(q_of)
            terms = zip(p_of, q_of, strict=True)
            expected.append(float(sum(a / of_p * ((a / of_p) / (b / of_q)).ln() for a, b in terms)))
    assert kl_divergence(logits, others).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-11)


def test_kl_of_states_that_differ_by_rounding_is_far_below_an_exact_compile_s_gate() -> None:
    """Rounding of the states alone: what two exact forms of a model differ by."""
    model = loaded("llama").model
    hidden = 9.0 * torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    noise = hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    divergences = divergence(model, hidden, model, noise)
    assert float(divergences.kl.min()) >= 0.0
    assert float(divergences.kl.mean()) < 1e-11


def test_kl_of_half_precision_logits_is_computed_in_single() -> None:
    logits = random_logits(3)
    assert log_softmax(logits.bfloat16()).dtype == torch.float32


def test_two_models_are_compared_chunk_by_chunk_over_all_tokens() -> None:
    llama, granite = loaded("llama").model, loaded("granite").model
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(128 + 37, HIDDEN, generator=generator) for _ in range(2))
    divergences = divergence(llama, p, granite, q)
    log_p, log_q = log_softmax(lm_head(llama, p)), log_softmax(lm_head(granite, q))
    expected = functional.kl_div(log_q.double(), log_p.double(), reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(divergences.kl, expected, rtol=1e-4)
    assert torch.equal(divergences.same_top1, log_p.argmax(dim=-1) == log_q.argmax(dim=-1))
    assert float(expected.min()) > 0.0


def test_the_summaries_of_a_divergence_are_those_of_its_tokens() -> None:
    divergences = TokenDivergence(torch.tensor([0.0, 3.0, 0.0, 4.0]), torch.tensor([True, False, True, True]))
    assert divergences.mean == pytest.approx(1.75)
    assert divergences.rms == pytest.approx(2.5)
    assert divergences.top1_agreement == pytest.approx(0.75)
    assert TokenDivergence(torch.arange(101.0), torch.ones(101, dtype=torch.bool)).p99 == pytest.approx(99.0)


@pytest.mark.parametrize(
    ("vocabulary", "n", "sizes"),
    [
        (VOCAB, 0, []),
        (VOCAB, 5, [5]),
        (49_152, 128, [128]),
        (49_152, 300, [128, 128, 44]),
        (262_144, 57, [24, 24, 9]),
        (10**8, 2, [1, 1]),
    ],
)
def test_chunks_cover_every_token_once_and_have_a_fixed_number_of_bytes(
    vocabulary: int, n: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("llama").model
    head = SimpleNamespace(weight=torch.empty(vocabulary, 8, device="meta"))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    parts = [list(range(n))[part] for part in chunks(n, model)]
    assert [len(part) for part in parts] == sizes and all(4 * vocabulary * size <= 2**25 for size in sizes if size > 1)
    assert [token for part in parts for token in part] == list(range(n))


# -------------------------------------------------------------------------------- log-probabilities


def mean_by_hand(ids: tuple[int, ...], n_prompt: int, steering: Program | None = None) -> float:
    """Mean log-probability of the response tokens of one row, from the model's plain logits."""
    model, batch = loaded("gemma2").model, pad([Encoded(ids, n_prompt)], [0], PAD_ID)
    with torch.no_grad(), steered(model, steering, roles=batch.roles):
        log_p = model(input_ids=batch.input_ids).logits[0].double().log_softmax(dim=-1)
    return float(np.mean([float(log_p[at - 1, ids[at]]) for at in range(n_prompt, len(ids))]))


def test_mean_log_probabilities_are_those_of_each_text_alone_in_the_order_given() -> None:
    rows = texts(((5, 4), (3, 9), (4, 1), (2, 6)))
    expected = [mean_by_hand(row.ids, row.n_prompt) for row in rows]
    assert mean_logprobs(loaded("gemma2"), rows) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.1


def test_mean_log_probabilities_under_a_program() -> None:
    rows, steering = texts(), program("gemma2", intervention(positions="response"))
    plain, under = (mean_logprobs(loaded("gemma2"), rows, program) for program in (None, steering))
    assert under == pytest.approx([mean_by_hand(row.ids, row.n_prompt, steering) for row in rows], abs=1e-5)
    # The first response token is predicted at the prompt, where 'response' does not act; every row has a second one.
    assert float(np.abs(under - plain).min()) > 1e-3


def test_hooks_without_roles_take_a_whole_pass_for_a_prompt() -> None:
    rows = texts()
    with steered(loaded("gemma2").model, program("gemma2", intervention(positions="response"))):
        assert mean_logprobs(loaded("gemma2"), rows) == pytest.approx(
            [mean_by_hand(row.ids, row.n_prompt) for row in rows], abs=1e-5
        )


def test_a_margin_is_positive_minus_negative_of_each_pair_under_the_plain_prompt() -> None:
    one = loaded("gemma2")
    pairs = [Pair(Text(f"w9 w{n} w8", "w20 w21"), Text(f"w{n}", f"w3{n} w40 w41"), f"w{n} w50") for n in (6, 7, 8)]
    encoded = encode_pairs(one, pairs)
    assert [e.n_prompt for e in encoded] == [2] * 6, "the plain prompt, not the template's"
    assert encoded[1] == encode(one.tokenizer, Text("w7 w50", "w20 w21"))
    assert encoded[4] == encode(one.tokenizer, Text("w7 w50", "w37 w40 w41"))
    expected = [mean_by_hand((n, 50, 20, 21), 2) - mean_by_hand((n, 50, 30 + n, 40, 41), 2) for n in (6, 7, 8)]
    assert margins(mean_logprobs(one, encoded)) == pytest.approx(expected, abs=1e-5)


def test_token_log_probabilities_over_chunks_with_shared_states_and_gradients() -> None:
    model, n = loaded("llama").model, 128 + 9
    states = torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(n) % VOCAB
    plain = log_softmax(lm_head(model, states)).gather(1, targets[:, None])[:, 0]
    (expected,) = torch.autograd.grad(plain.square().sum(), states)
    logprobs = token_logprobs(model, states, targets)
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), states)
    torch.testing.assert_close(logprobs, plain)
    torch.testing.assert_close(gradient, expected)
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1)) % n  # every state predicts two tokens
    torch.testing.assert_close(token_logprobs(model, states, targets[order], order), plain[order])


def predicts(text: Encoded, place: int) -> bool:
    """Whether a token of a response comes next."""
    return text.roles[place + 1 : place + 2] == [RESPONSE]


def test_final_states_come_text_after_text_however_the_texts_are_packed() -> None:
    one, texts = loaded("llama"), sharing_texts()
    texts = sorted(texts, key=lambda text: (len(text.ids) * 7) % 5)
    assert [len(text.ids) for text in texts] != sorted(len(text.ids) for text in texts)
    for under in (None, program("llama", intervention(layer=1))):
        found, alone = final_states(one, texts, under), [final_states(one, [text], under) for text in texts]
        for part in ("response", "turns", "before"):
            expected = torch.cat([getattr(states, part) for states in alone])
            assert torch.allclose(getattr(found, part), expected, atol=1e-5), part
        # A beginning that several texts have is there once, where the first of them has it.
        places = [(text, place + 1) for text in texts for place in range(len(text.ids)) if not predicts(text, place)]
        given = [(text.ids[:read], tuple(text.roles[:read])) for text, read in places]
        distinct = list(dict.fromkeys(given))
        assert found.repeats.tolist() == [given.count(beginning) for beginning in distinct]
        assert len(distinct) < len(given), "these texts share some"
        first = [given.index(beginning) for beginning in distinct]
        assert torch.allclose(found.prompt, torch.cat([states.prompt for states in alone])[first], atol=1e-5)
        assert found.texts.tolist() == [row for row, states in enumerate(alone) for _position in states.response]
        assert torch.allclose(found.first(3), final_states(one, texts[:3], under).response, atol=1e-5)
