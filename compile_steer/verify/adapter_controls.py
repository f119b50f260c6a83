"""The adapter's own controls: what others of its size do, and its dial. Read off the reloaded model alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import encode_pairs, logprob_margins
from compile_steer.models.reload import ADAPTER, adapter_scaled
from compile_steer.verify.parity import AdapterControls
from compile_steer.verify.reference import Reference

_RANDOM = 3


def adapter_controls(
    reference: Reference, artifact: LoadedModel, compiled: np.ndarray, n_pairs: int
) -> AdapterControls:
    """Mean change of the contrast on the first test pairs under the adapter, random ones of the same norms, the
    adapter negated and halved; and under the adapter on another behaviour's pairs, if the recipe names them.

    Args:
        artifact: the base with the reloaded adapter; left as it was.
        compiled: its contrast on the test pairs, which the judge has measured already.
    """
    pairs = encode_pairs(artifact, reference.behaviour.test[:n_pairs])
    base = reference.base_behaving.contrast[: len(pairs) // 2]

    def effect(dial: float = 1.0) -> float:
        with adapter_scaled(artifact, dial):
            return float((logprob_margins(artifact, pairs) - base).mean())

    by_chance = []
    for seed in range(_RANDOM):
        with _randomised(artifact, reference.recipe.seed + seed):
            by_chance.append(effect())
    other_behaviour = None
    if reference.other_behaviour is not None:
        others, before = reference.other_behaviour
        other_behaviour = float((logprob_margins(artifact, others) - before).mean())
    return AdapterControls(
        effect=float((compiled[: len(base)] - base).mean()),
        random=by_chance,
        negated=effect(-1.0),
        halved=effect(0.5),
        other_behaviour=other_behaviour,
        n_pairs=len(base),
    )


@contextmanager
def _randomised(artifact: LoadedModel, seed: int) -> Iterator[None]:
    """Every B A of the adapter replaced by a random product of the same rank and Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    factors = list(_factors(artifact))
    kept = [(A.clone(), B.clone()) for A, B in factors]
    try:
        for A, B in factors:
            norm = _norm(A, B)
            A.copy_(torch.randn(A.shape, generator=generator).to(A))
            B.copy_(torch.randn(B.shape, generator=generator).to(B))
            B.mul_(norm / _norm(A, B))
        yield
    finally:
        for (A, B), (before_A, before_B) in zip(factors, kept, strict=True):
            A.copy_(before_A)
            B.copy_(before_B)


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
