"""What a student is trained on: every objective is one function that accumulates its gradient.

p is the steered model's next-token distribution, q the student's:

    forward_kl      KL(p || q)                                  on the steered model's own texts
    reverse_kl      KL(q || p)                                  on the student's own texts (on-policy)
    jensen_shannon  KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2   (Agarwal et al. 2306.13649, beta 1/2)
    hidden          ||h_p - h_q||^2 / ||h_p||^2                 after the last intervened block (LoRRA, Zou et al. 2310.01405)

The likelihood of steered samples is the fifth: `lower/likelihood.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compile_steer.models.forward import lm_head
from compile_steer.models.logprobs import chunks, log_softmax


@dataclass(frozen=True)
class Objective:
    """`backward(model, teacher, student, weight)` adds `weight` times the mean's gradient to what the student's
    states [n_tokens, d_model] came from, and returns the mean itself.

    `on_policy`: the texts are the student's own. `at_end`: the states are the final ones; otherwise those after
    the last intervened block, and nothing above it is run.
    """

    backward: Callable[[nn.Module, Tensor, Tensor, float], float]
    on_policy: bool = False
    at_end: bool = True


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _forward_kl(log_q, log_p)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_forward_kl(log_p, log_m) + _forward_kl(log_q, log_m))


def _on_logits(
    per_token: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[nn.Module, Tensor, Tensor, float], float]:
    """The mean of `per_token(log_p, log_q)` [n]; one chunk of logits of each model is all that ever exists."""

    def backward(model: nn.Module, teacher: Tensor, student: Tensor, weight: float) -> float:
        leaf, total = student.detach().requires_grad_(), 0.0
        for part in chunks(leaf.shape[0]):
            with torch.no_grad():
                log_p = log_softmax(lm_head(model, teacher[part]))
            loss = per_token(log_p, log_softmax(lm_head(model, leaf[part]))).sum() / leaf.shape[0]
            (weight * loss).backward()
            total += float(loss.detach())
        student.backward(leaf.grad)
        return total

    return backward


def _relative_error(_model: nn.Module, teacher: Tensor, student: Tensor, weight: float) -> float:
    wanted = teacher.float()
    loss = ((student.float() - wanted).square().sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-12)).mean()
    (weight * loss).backward()
    return float(loss.detach())


OBJECTIVES = {
    "forward_kl": Objective(_on_logits(_forward_kl)),
    "reverse_kl": Objective(_on_logits(_reverse_kl), on_policy=True),
    "jensen_shannon": Objective(_on_logits(_jensen_shannon)),
    "hidden": Objective(_relative_error, at_end=False),
}
