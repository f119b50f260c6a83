"""Divergences between next-token distributions and intervals for means and ratios, in nats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from scipy.stats import bootstrap, mannwhitneyu
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


def auroc(high: np.ndarray, low: np.ndarray) -> float:
    """The chance that one of `high` [n] is above one of `low` [m], ties by half (Mann and Whitney's U)."""
    return float(mannwhitneyu(high, low).statistic) / (len(high) * len(low))


@dataclass(frozen=True)
class Interval:
    """A point estimate with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: np.ndarray, *, seed: int, confidence: float = 0.95) -> Interval:
    """The mean of [n] values with a bias-corrected bootstrap interval (Efron; scipy's BCa)."""
    found = _bootstrap((values,), lambda x, axis: np.asarray(np.mean(x, axis=axis)), seed, confidence)
    if found is None:
        raise ValueError("a mean of finite values has a finite interval")
    return found


def bootstrap_ratio(above: Tensor, below: Tensor, texts: Tensor, *, seed: int, confidence: float = 0.95) -> Interval:
    """Sum of `above` over the sum of `below`, both [n_tokens], resampled over texts; with `below` 1 it is a mean.

    The text is the unit: tokens of one text share its topic and its turns, so that they are not independent, and an
    interval over tokens would be too narrow.

    Args:
        texts: the text that each token belongs to, [n_tokens].

    Raises:
        ValueError: values that are not finite, or a `below` that is 0 in nearly every text.
    """
    at = texts.numpy()
    sums = [np.bincount(at, weights=values.double().numpy())[np.unique(at)] for values in (above, below)]

    def ratio(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        divisor = b.sum(axis=axis)
        return np.asarray(a.sum(axis=axis) / np.where(divisor == 0, np.nan, divisor))

    found = _bootstrap((sums[0], sums[1]), ratio, seed, confidence)
    if found is None or not math.isfinite(found.value):
        raise ValueError("found no finite ratio; needed: finite values, and a divisor above 0 in nearly every text.")
    return found


def bootstrap_recovery(
    base: np.ndarray, steered: np.ndarray, compiled: np.ndarray, *, seed: int, confidence: float = 0.95
) -> Interval | None:
    """(compiled - base) / (steered - base) of mean scores [n], resampled over prompts.

    None where the steered score does not differ from the base's, on the whole or in some resamples: there is
    then nothing to recover for certain.
    """
    if math.isclose(float(np.mean(steered - base)), 0.0, abs_tol=1e-9):
        return None

    def ratio(b: np.ndarray, s: np.ndarray, c: np.ndarray, axis: int) -> np.ndarray:
        effect = np.mean(s - b, axis=axis)
        return cast(np.ndarray, np.mean(c - b, axis=axis) / np.where(effect == 0, np.nan, effect))

    return _bootstrap((base, steered, compiled), ratio, seed, confidence)


def _bootstrap(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int, confidence: float
) -> Interval | None:
    """None where no finite interval exists: some resamples have no value."""
    value = float(statistic(*samples, axis=0))
    if all(np.ptp(sample - samples[0]) == 0 for sample in samples) and np.ptp(samples[-1]) == 0:
        return Interval(value, value, value)  # nothing to resample: scipy would answer NaN
    paired = len(samples) > 1
    # BCa cannot correct what has no skew to measure (then scipy answers NaN); plain percentiles can.
    methods: tuple[Literal["BCa", "percentile"], ...] = ("percentile",) if paired else ("BCa", "percentile")
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = bootstrap(
                samples,
                statistic,
                paired=paired,
                vectorized=True,
                n_resamples=2000,
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            )
        low, high = (float(bound) for bound in result.confidence_interval)
        if math.isfinite(low) and math.isfinite(high):
            return Interval(value, low, high)
    return None
