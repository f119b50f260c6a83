"""KL divergences compared with torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compile_steer.models.forward import lm_head
from compile_steer.models.logprobs import CHUNK_TOKENS, TokenDivergence, chunks, divergence, kl_divergence, log_softmax
from tests.helpers.tiny import HIDDEN, loaded


def random_logits(seed: int, n: int = 6, vocab: int = 41, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def test_kl_is_torch_s_own_and_has_a_direction() -> None:
    log_p, log_q = (random_logits(seed).double().log_softmax(dim=-1) for seed in (0, 1))
    wanted = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(kl_divergence(log_p, log_q), wanted, rtol=1e-5)
    assert not torch.allclose(kl_divergence(log_q, log_p), wanted, rtol=0.1)


def test_kl_of_states_that_differ_by_rounding_is_far_below_an_exact_compile_s_gate() -> None:
    """Rounding of the states alone: what two exact forms of one model differ by."""
    model = loaded("llama").model
    hidden = 9.0 * torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))
    noise = hidden * (1 + 1e-7 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)))
    found = divergence(model, hidden, model, noise)
    assert float(found.kl.min()) >= 0.0
    assert float(found.kl.mean()) < 1e-11


def test_kl_of_half_precision_logits_is_computed_in_single() -> None:
    logits = random_logits(3)
    assert log_softmax(logits.bfloat16()).dtype == torch.float32


def test_two_models_are_compared_chunk_by_chunk_over_all_tokens() -> None:
    llama, granite = loaded("llama").model, loaded("granite").model
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(CHUNK_TOKENS + 37, HIDDEN, generator=generator) for _ in range(2))
    found = divergence(llama, p, granite, q)
    log_p, log_q = log_softmax(lm_head(llama, p)), log_softmax(lm_head(granite, q))
    wanted = functional.kl_div(log_q.double(), log_p.double(), reduction="none", log_target=True).sum(dim=-1)
    assert torch.allclose(found.kl, wanted, rtol=1e-4)
    assert torch.equal(found.same_top1, log_p.argmax(dim=-1) == log_q.argmax(dim=-1))
    assert float(wanted.min()) > 0.0


def test_the_summaries_of_a_divergence_are_those_of_its_tokens() -> None:
    found = TokenDivergence(torch.tensor([0.0, 3.0, 0.0, 4.0]), torch.tensor([True, False, True, True]))
    assert found.mean == pytest.approx(1.75)
    assert found.rms == pytest.approx(2.5)
    assert found.top1_agreement == pytest.approx(0.75)
    assert TokenDivergence(torch.arange(101.0), torch.ones(101, dtype=torch.bool)).p99 == pytest.approx(99.0)


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (5, [5]), (8, [8]), (19, [8, 8, 3])])
def test_chunks_cover_every_token_once(n: int, sizes: list[int]) -> None:
    parts = [list(range(n))[part] for part in chunks(n, 8)]
    assert [len(part) for part in parts] == sizes
    assert [token for part in parts for token in part] == list(range(n))
