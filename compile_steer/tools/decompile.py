"""Decompile: an adapter or fine-tuned checkpoint and its base -> the steering program that explains it best.

At every block both models are given the fine-tuned one's stream, so what the two hand on differs by
what this block alone was changed to do. The best constant for that, over tokens weighted by 1/||h||^2, is
their mean difference: one `add` a block. How much it explains is said block by block, and for all of
them together as a share of the divergence on texts that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.artifacts.files import save_json
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence
from compile_steer.models.reload import reload
from compile_steer.models.text import Text
from compile_steer.models.tokens import Batch, Encoded, batches, encode
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import PAD, steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

# A block that changes its output by less than this, relative to the stream, was not touched.
_UNTOUCHED = 1e-6


@dataclass(frozen=True)
class BlockChange:
    """What one block was changed to do: the constant's norm, the whole change relative to the stream (root mean
    square), and the share of the change's square that the constant explains."""

    layer: int
    norm: float
    relative_size: float
    explained: float


@dataclass(frozen=True)
class Decompiled:
    """The program, block by block, and the share of KL(other || base) that it explains on held-out texts."""

    program: Program
    blocks: list[BlockChange]
    kl_base: float
    kl_left: float

    @property
    def explained(self) -> float:
        return 1.0 - self.kl_left / self.kl_base

    def summary(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON."""
        blocks = [asdict(block) for block in self.blocks]
        return {"blocks": blocks, "kl_base": self.kl_base, "kl_left": self.kl_left, "explained": self.explained}

    def save(self, program: Path, report: Path) -> None:
        self.program.save(program)
        save_json(report, self.summary())


def decompile(base: LoadedModel, other: LoadedModel, behaviour: Behaviour, progress: Progress) -> Decompiled:
    """Fit on both sides of the training pairs, measure on the neutral texts.

    Raises:
        ArtifactError: the models have other shapes, or behave alike, so that there is nothing to explain.
    """
    shapes = [(one.layout.n_layers, one.layout.d_model) for one in (base, other)]
    if shapes[0] != shapes[1]:
        raise ArtifactError(
            f"{other.id} has {shapes[1][0]} blocks of width {shapes[1][1]}, the base {shapes[0][0]} of {shapes[0][1]}; "
            "needed: a fine-tuned copy of the base, or an adapter for it."
        )
    sides = [side for pair in behaviour.train for side in (pair.positive, pair.negative)]
    with progress.phase("block by block: what was changed", base.layout.n_layers) as advance:
        flows: list[tuple[Batch, Tensor | None]] = [(batch, None) for batch in _batches(base, sides)]
        found = []
        for layer in range(base.layout.n_layers):
            flows, vector, change = _block(base, other, flows, layer)
            found.append((vector, change))
            advance(1)
    kept = [(vector, change) for vector, change in found if change.relative_size > _UNTOUCHED]
    if not kept:
        raise ArtifactError(f"{other.id} computes what its base does at every block; there is nothing to decompile.")
    program = Program(
        tuple(Intervention(Site(change.layer), "add", vector) for vector, change in kept), base.id, base.revision
    )
    kl_base, kl_left = _divergences(base, other, program, behaviour.neutral)
    return Decompiled(program, [change for _vector, change in kept], kl_base, kl_left)


def _batches(base: LoadedModel, texts: Sequence[Text]) -> list[Batch]:
    encoded: list[Encoded] = [encode(base.tokenizer, text) for text in texts]
    return list(batches(base, encoded))


def _block(
    base: LoadedModel, other: LoadedModel, flows: Sequence[tuple[Batch, Tensor | None]], layer: int
) -> tuple[list[tuple[Batch, Tensor | None]], Tensor, BlockChange]:
    """Run one block of both on the other's stream: its outputs, the mean difference [d_model], and its measure."""
    d_model = base.layout.d_model
    total = torch.zeros(d_model, dtype=torch.float64, device=base.device)
    weights = squares = 0.0
    after: list[tuple[Batch, Tensor | None]] = []
    for batch, hidden in flows:
        changed, plain = (_run(model, batch, hidden, layer) for model in (other.model, base.model))
        real = batch.roles != PAD
        difference = (changed - plain)[real].double()
        weight = 1.0 / plain[real].double().square().sum(dim=1).clamp(min=1e-12)
        total += weight @ difference
        weights += float(weight.sum())
        squares += float((weight * difference.square().sum(dim=1)).sum())
        after.append((batch, changed))
    mean = total / weights
    explained = float(mean.square().sum()) * weights / squares if squares > 0 else 0.0
    n_tokens = sum(int((batch.roles != PAD).sum()) for batch, _hidden in flows)
    change = BlockChange(layer, float(mean.norm()), (squares / n_tokens) ** 0.5, explained)
    return after, mean.float().cpu(), change


def _run(model: nn.Module, batch: Batch, hidden: Tensor | None, layer: int) -> Tensor:
    with torch.no_grad():
        return run_blocks(model, batch.input_ids, batch.attention_mask, start=layer, stop=layer + 1, hidden=hidden)


def _divergences(base: LoadedModel, other: LoadedModel, program: Program, texts: Sequence[Text]) -> tuple[float, float]:
    """Mean KL(other || base) and KL(other || base under the program), nats a token of the responses."""
    states: list[list[Tensor]] = [[], [], []]
    for batch in _batches(base, texts):
        chosen = batch.predicts_response
        with torch.no_grad():
            states[0].append(run_blocks(other.model, batch.input_ids, batch.attention_mask)[chosen])
            states[1].append(run_blocks(base.model, batch.input_ids, batch.attention_mask)[chosen])
            with steered(base.model, program, roles=batch.roles):
                states[2].append(run_blocks(base.model, batch.input_ids, batch.attention_mask)[chosen])
    changed, plain, under = (torch.cat(parts) for parts in states)
    return (
        divergence(other.model, changed, base.model, plain).mean,
        divergence(other.model, changed, base.model, under).mean,
    )


def run_decompile(run: Run, folder: Path) -> Decompiled:
    """The program that explains the artifact at `folder` best, left beside the recipe's own."""
    distributed.require_alone("decompilation")
    found = decompile(run.model, reload(folder, run.model), run.data, run.progress)
    found.save(run.paths.decompiled, run.paths.decompiled.with_suffix(".json"))
    return found
