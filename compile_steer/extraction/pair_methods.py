"""Directions from contrast pairs: mean difference, principal axis, logistic regression.

The direction of every method has the length of the mean difference at its block, so that a coefficient means the same
for all methods: 1 moves an activation by as much as the behaviour does on average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Context
from compile_steer.extraction.options import ExtractOptions, PairMethod
from compile_steer.models.forward import read_activations
from compile_steer.steering.directions import FROM_LABELS, unit

_LOGISTIC_PENALTY = 1.0  # scikit-learn's default, C = 1


@dataclass(frozen=True)
class ExtractedDirections:
    """A direction for each block, `vectors` [L, d] (0 where a block has none), and controls, `shuffled` [n, L, d].

    The controls come from labels that carry no information, or from what `controls` says in words. `positive`
    [1 + n, L, d] is the mean activation of the positive side, with the real labels and then with each shuffling of
    them; None if no activations were read.
    """

    vectors: Tensor
    shuffled: Tensor
    positive: Tensor | None = None
    controls: str = FROM_LABELS

    def resized(self, length: Tensor) -> ExtractedDirections:
        """Return the same directions, each with the `length` [L] of its block."""
        vectors, shuffled = (unit(rows) * length.unsqueeze(-1) for rows in (self.vectors, self.shuffled))
        return replace(self, vectors=vectors, shuffled=shuffled)

    def projections(self) -> Tensor | None:
        """Mean projection [1 + n, L] of each positive side on its unit direction: Stolfo's target (2410.12877)."""
        if self.positive is None:
            return None
        return (self.positive * unit(torch.cat([self.vectors[None], self.shuffled]))).sum(dim=-1)


def from_pairs(context: Context, options: ExtractOptions, method: PairMethod) -> ExtractedDirections:
    """Read both sides of the training pairs, and find the direction of every block with its controls.

    Raises `RecipeError` for too few pairs, or pairs whose sides are the same up to the token that is read.
    """
    pairs = options.first(context.data.train, "pairs")
    sides = [[pair.positive for pair in pairs], [pair.negative for pair in pairs]]
    if options.readout == "last_prompt":
        same = sum(pair.positive.prompt == pair.negative.prompt for pair in pairs)
        if same:
            raise RecipeError(
                f"extract.readout last_prompt: {same} of {len(pairs)} pairs have the same prompt on both sides, so the "
                "activations at the prompt's last token are equal. Set data.positive_template (for example "
                "'{prompt} Answer in lowercase.'), or use readout response_mean."
            )
        # Nothing of the responses is read, so they are not run either.
        sides = [[replace(text, response="") for text in side] for side in sides]
    with context.progress.phase("reading activations of all blocks", 2 * len(pairs)) as advance:
        positive, negative = (
            read_activations(context.model, side, point=options.read_point, readout=options.readout, advance=advance)
            for side in sides
        )
    return with_controls(positive, negative, method, options.shuffled, context.seed)


def with_controls(
    positive: Tensor, negative: Tensor, method: PairMethod, n_controls: int, seed: int
) -> ExtractedDirections:
    """From activations [n, L, d], the direction of every block, and those where a random half of the pairs is swapped."""
    generator, n = torch.Generator().manual_seed(seed), len(positive)
    vectors, means = [fit(positive, negative, method)], [positive.mean(dim=0)]
    for _ in range(n_controls):
        # Exactly half: what the pairs have in common cancels, and only their noise is left.
        swap = torch.zeros(n, dtype=torch.bool)
        swap[torch.randperm(n, generator=generator)[: n // 2]] = True
        swap = swap.view(-1, 1, 1)
        high, low = torch.where(swap, negative, positive), torch.where(swap, positive, negative)
        vectors.append(fit(high, low, method))
        means.append(high.mean(dim=0))
    return ExtractedDirections(vectors[0], torch.stack(vectors[1:]), torch.stack(means))


def fit(positive: Tensor, negative: Tensor, method: PairMethod) -> Tensor:
    """Return the direction of every block, [L, d], each as long as the mean difference, from activations [n, L, d]."""
    mean: Tensor = (positive - negative).mean(dim=0)
    if method == "mean_difference":
        return mean
    axis = principal_axis if method == "pca" else logistic_weights
    axes: Tensor = torch.stack([axis(positive[:, layer] - negative[:, layer]) for layer in range(mean.shape[0])])
    # A principal axis has no sign of its own: point it along the mean difference.
    axes = axes * torch.where((axes * mean).sum(dim=-1, keepdim=True) < 0, -1.0, 1.0)
    length: Tensor = mean.norm(dim=-1, keepdim=True)
    return axes * length


def principal_axis(differences: Tensor) -> Tensor:
    """Return the first principal axis [d] of the pairs' differences [n, d] (Zou et al. 2310.01405, section 3.1).

    The differences are not centred. The paper takes them in both directions, so that their mean is 0 and what they
    have in common is variance.
    """
    axes: Tensor = torch.linalg.svd(differences, full_matrices=False)[2]
    return axes[0]


def logistic_weights(differences: Tensor) -> Tensor:
    """Return the unit weights [d] of an L2-penalised logistic regression of the side on the difference [n, d].

    The intercept cancels in differences. With n pairs in d >> n dimensions the weights lie in the span of the
    differences D, so the problem is solved for their n coefficients a: w = D^T a (representer theorem).
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    scaled = differences.double()
    size = scaled.norm(dim=-1).mean()
    if float(size) == 0.0:  # the sides are equal here: block 0's input at the same last token, for example
        return torch.zeros_like(differences[0])
    scaled = scaled / size
    gram = (scaled @ scaled.T).numpy()

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        margins = gram @ a
        value = np.logaddexp(0.0, -margins).mean() + 0.5 * _LOGISTIC_PENALTY / len(a) * a @ margins
        gradient = gram @ (-expit(-margins) + _LOGISTIC_PENALTY * a) / len(a)
        return float(value), gradient

    solution: np.ndarray = minimize(loss, np.zeros(len(gram)), jac=True, method="L-BFGS-B").x
    weights: Tensor = scaled.T @ torch.from_numpy(solution)
    axis: Tensor = weights / weights.norm()
    return axis.float()
