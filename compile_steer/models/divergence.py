"""Divergences between next-token distributions, in nats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compile_steer.models.forward import lm_head

CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Divergence:
    """KL(p || q) of each token [n] in nats, and whether both put the same token first [n]."""

    kl: Tensor
    same_top1: Tensor

    @staticmethod
    def join(parts: list[Divergence]) -> Divergence:
        return Divergence(torch.cat([p.kl for p in parts]), torch.cat([p.same_top1 for p in parts]))

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def rms(self) -> float:
        """Root mean square over tokens: a few broken tokens show here that a mean hides."""
        return float(self.kl.square().mean().sqrt())

    @property
    def p99(self) -> float:
        return float(self.kl.quantile(0.99))

    @property
    def top1_agreement(self) -> float:
        return float(self.same_top1.double().mean())


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n] from log-probabilities [n, vocab].

    An error in either normaliser enters at first order: with float32 log-probabilities that alone is about
    1e-7 nats a token, more than an exact compile's divergence. The judge gives float64.
    """
    return log_p.exp().mul_(log_p - log_q).sum(dim=-1).clamp_(min=0.0)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def token_log_probabilities(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target [n], from the final hidden states [n, d_model] that predict them; differentiable.

    All their logits exist at once: give it a chunk of tokens at a time.
    """
    return log_softmax(lm_head(model, states)).gather(1, targets.unsqueeze(1)).squeeze(1)


def chunks(n: int, size: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Slices of at most `size` over n tokens, so that n x vocabulary never exists at once."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def divergence(model_p: nn.Module, hidden_p: Tensor, model_q: nn.Module, hidden_q: Tensor) -> Divergence:
    """Compare two models' next-token distributions at final hidden states [n, d_model], chunk by chunk."""
    parts = []
    with torch.no_grad():
        for part in chunks(hidden_p.shape[0]):
            log_p = torch.log_softmax(lm_head(model_p, hidden_p[part]).double(), dim=-1)
            log_q = torch.log_softmax(lm_head(model_q, hidden_q[part]).double(), dim=-1)
            same = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
            parts.append(Divergence(kl_divergence(log_p, log_q).cpu(), same.cpu()))
    return Divergence.join(parts)
