"""From the activations of both sides of contrast pairs to a direction at every block.

The direction of every method has the length of the mean difference at that block, so a coefficient
means the same for all: 1 moves an activation by as much as the behaviour does on average.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from compile_steer.extract.found import Found
from compile_steer.extract.options import PairMethod

_LOGISTIC_PENALTY = 1.0


def fit(positive: Tensor, negative: Tensor, method: PairMethod) -> Tensor:
    """[n, L, d] activations of both sides -> [L, d] directions, each as long as the mean difference there."""
    mean: Tensor = (positive - negative).mean(dim=0)
    if method == "mean_difference":
        return mean
    find = _principal if method == "pca" else _logistic
    units: Tensor = torch.stack([find(positive[:, layer], negative[:, layer]) for layer in range(mean.shape[0])])
    # A principal axis has no sign of its own: point it along the mean difference.
    units = units * torch.where((units * mean).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    length: Tensor = mean.norm(dim=-1, keepdim=True)
    return units * length


def _principal(positive: Tensor, negative: Tensor) -> Tensor:
    """First principal axis [d] of the pairs' differences, not centred: taken in both directions their mean is
    0, and what the differences have in common is variance, not offset (Zou et al. 2310.01405, section 3.1)."""
    axes: Tensor = torch.linalg.svd(positive - negative, full_matrices=False)[2]
    return axes[0]


def _logistic(positive: Tensor, negative: Tensor) -> Tensor:
    """Unit weights [d] of an L2-penalised logistic regression of the side on the pair's difference.

    The intercept cancels in differences. With n pairs in d dimensions the weights lie in the span of the
    differences D, so the problem is solved for their n coefficients a: w = D^T a (representer theorem).
    """
    differences = (positive - negative).double()
    size = differences.norm(dim=-1).mean()
    if float(size) == 0.0:  # the sides are equal here (block 0's input under one last token, say)
        return torch.zeros_like(positive[0])
    differences = differences / size
    gram = (differences @ differences.T).numpy()

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        margins = gram @ a
        value = np.logaddexp(0.0, -margins).mean() + 0.5 * _LOGISTIC_PENALTY / len(a) * a @ margins
        gradient = gram @ (-expit(-margins) + _LOGISTIC_PENALTY * a) / len(a)
        return float(value), gradient

    found = minimize(loss, np.zeros(len(gram)), jac=True, method="L-BFGS-B")
    weights: Tensor = differences.T @ torch.from_numpy(cast(np.ndarray, found.x))
    unit: Tensor = weights / weights.norm()
    return unit.float()


def find(positive: Tensor, negative: Tensor, method: PairMethod, count: int, seed: int) -> Found:
    """The direction at every block, and `count` that the method finds where a random half of the pairs has its sides
    swapped: what it makes of labels that say nothing, its length included.

    Exactly half, so that what the pairs have in common cancels and only their noise is left.
    """
    generator = torch.Generator().manual_seed(seed)
    n = positive.shape[0]
    vectors, means = [fit(positive, negative, method)], [positive.mean(dim=0)]
    for _ in range(count):
        swap = torch.zeros(n, dtype=torch.bool)
        swap[torch.randperm(n, generator=generator)[: n // 2]] = True
        swap = swap.view(-1, 1, 1)
        high, low = torch.where(swap, negative, positive), torch.where(swap, positive, negative)
        vectors.append(fit(high, low, method))
        means.append(high.mean(dim=0))
    return Found(vectors[0], torch.stack(vectors[1:]), torch.stack(means))
