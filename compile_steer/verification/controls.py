"""Controls beside the main comparison: what plain questions lose, and what an adapter does by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, compare_models, encode_pairs, final_states, logprob_margins
from compile_steer.models.reload import ADAPTER, adapter_scaled
from compile_steer.stats import equivalence
from compile_steer.verification.parity import AdapterControls, AdapterScale, Capability

if TYPE_CHECKING:
    from compile_steer.verification.reference import Reference

# An adapter's controls have to show large differences only, for which few pairs and texts suffice.
CONTROL_PAIRS = 4
_RANDOM_ADAPTERS = 3
_SCALES = (0.0, 0.5, 1.0, -1.0)
SCALE_TEXTS = 4


def capability_retention(base: np.ndarray, steered: np.ndarray, compiled: np.ndarray, margin: float) -> Capability:
    """Compare correct answers, [n] each; `margin` is the equivalence margin of their fraction.

    Raises:
        ValueError: fewer than two questions.
    """
    from scipy.stats import binomtest

    lost, gained = int((steered > compiled).sum()), int((steered < compiled).sum())
    # McNemar's exact test: which way the questions went that only one of the two answers correctly.
    p = float(binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0
    before, hooked, after = (float(correct.mean()) for correct in (base, steered, compiled))
    test = equivalence("capability", compiled - steered, margin)
    return Capability(len(base), before, hooked, after, lost, gained, p, test)


def adapter_controls(
    reference: Reference, artifact: LoadedModel, states: FinalStates, compiled: np.ndarray
) -> AdapterControls:
    """What the adapter changes on the first test pairs, and what random adapters, other scales and other pairs do.

    Args:
        artifact: the base with the reloaded adapter; left as it was.
        states: its final states on the held-out texts.
        compiled: its log-likelihood margins on all test pairs, [n_pairs].
    """
    data = reference.context.data
    pairs = encode_pairs(artifact, data.test[:CONTROL_PAIRS])
    others = reference.other_pairs
    base = reference.margins.base[: len(pairs) // 2]

    def effect(scale: float = 1.0) -> float:
        with adapter_scaled(artifact, scale):
            return float((logprob_margins(artifact, pairs) - base).mean())

    elsewhere = logprob_margins(artifact, others) - reference.other_margins
    random = []
    for seed in range(_RANDOM_ADAPTERS):
        with _randomised(artifact, reference.context.seed + seed):
            random.append(effect())
    return AdapterControls(
        effect=float((compiled[: len(base)] - base).mean()),
        random=random,
        negated=effect(-1.0),
        halved=effect(0.5),
        other_behaviour=float(elsewhere.mean()) if others else None,
        n_pairs=len(base),
        scales=adapter_scales(reference, artifact, states),
    )


def adapter_scales(reference: Reference, artifact: LoadedModel, states: FinalStates) -> list[AdapterScale]:
    """Compare the adapter at each scale with the hooks at that scale; `artifact` is left as it was."""
    # Written at scale 1, where its final states are `states`, and read at every scale.
    base, scales = reference.model, []
    for scale in _SCALES:
        steered, kl_base = reference.scaled(scale)
        if scale == 1:
            compiled = states.first(SCALE_TEXTS)
        else:
            with adapter_scaled(artifact, scale):
                compiled = final_states(artifact, reference.heldout[:SCALE_TEXTS]).response
        kl = compare_models(base, steered, artifact, compiled).mean
        scales.append(AdapterScale(scale, kl, kl / kl_base if kl_base else None))
    return scales


@contextmanager
def _randomised(artifact: LoadedModel, seed: int) -> Iterator[None]:
    """Every B A of the adapter replaced by a random product of the same rank and Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    kept = [(A, B, A.clone(), B.clone()) for A, B in _factors(artifact)]
    try:
        for A, B, *_kept in kept:
            norm = _norm(A, B)
            A.copy_(torch.randn(A.shape, generator=generator).to(A))
            B.copy_(torch.randn(B.shape, generator=generator).to(B))
            B.mul_(norm / _norm(A, B))
        yield
    finally:
        for A, B, own_A, own_B in kept:
            A.copy_(own_A)
            B.copy_(own_B)


def _factors(artifact: LoadedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """The adapter's (A [r, d_in], B [d_out, r]), of Linears and of embeddings."""
    for module in artifact.model.modules():
        if isinstance(module, LoraLayer):
            if ADAPTER in module.lora_A:
                yield module.lora_A[ADAPTER].weight.data, module.lora_B[ADAPTER].weight.data
            if ADAPTER in module.lora_embedding_A:
                yield module.lora_embedding_A[ADAPTER].data, module.lora_embedding_B[ADAPTER].data


def _norm(A: Tensor, B: Tensor) -> Tensor:
    """||B A|| by the two Gram matrices, which are small."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=1e-30).sqrt()
