"""What other directions of the same length do to the same pairs: the effect needs them to mean anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from compile_steer.behaviour import Pair
from compile_steer.contrast import contrast_scores, encode_pairs
from compile_steer.models import Loaded
from compile_steer.program import Program, replace_intervention
from compile_steer.progress import Tick
from compile_steer.validate.report import Controls, Separability
from compile_steer.validate.shared import SharedPrefix


def with_vector(program: Program, vector: Tensor) -> Program:
    """`program` with every vector replaced by `vector` at the same length."""
    return Program(
        tuple(replace_intervention(i, vector=vector / vector.norm() * i.vector.norm()) for i in program.interventions),
        program.model,
        program.revision,
    )


def measure_controls(
    loaded: Loaded, pairs: Sequence[Pair], program: Program, shuffled: Tensor, n_random: int, seed: int, tick: Tick
) -> Controls:
    """Mean contrast effects of the program, of random and shuffled-label directions, and of the opposite sign.

    Args:
        shuffled: [n, d_model] directions from shuffled labels at the program's layer.
    """
    shared = SharedPrefix(loaded, encode_pairs(loaded, pairs))
    shared.advance(program.first_layer)
    base = shared.base()

    def effect(other: Program) -> float:
        value = float(contrast_scores(shared.under(other) - base).mean())
        tick(1)
        return value

    generator = torch.Generator().manual_seed(seed)
    width = program.interventions[0].vector.shape[0]
    random = [torch.randn(width, generator=generator) for _ in range(n_random)]
    return Controls.of(
        effect(program),
        [effect(with_vector(program, vector)) for vector in random],
        [effect(with_vector(program, vector)) for vector in shuffled],
        effect(-program),
    )


def separability(positive: Tensor, negative: Tensor, direction: Tensor) -> Separability:
    """How the direction [d] tells held-out activations [n, d] of the two sides apart."""
    unit = direction / direction.norm()
    high, low = (positive @ unit).numpy(), (negative @ unit).numpy()
    spread = float(np.sqrt((high.var(ddof=1) + low.var(ddof=1)) / 2))
    differences = positive - negative
    cosines = (differences @ unit) / differences.norm(dim=-1).clamp(min=1e-12)
    return Separability(
        auroc=float(mannwhitneyu(high, low).statistic) / (len(high) * len(low)),
        d_prime=float(high.mean() - low.mean()) / spread if spread > 0 else 0.0,
        mean_cosine=float(cosines.mean()),
    )
