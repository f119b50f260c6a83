"""Decompile: an adapter or fine-tuned checkpoint and its base -> the steering program that explains it best.

At every block both models get the fine-tuned model's stream as input, so their outputs differ only by what this block was
changed to do. The best constant for that, over tokens weighted by 1/||h||^2, is their mean difference: one `add` per block.
How much it explains is reported block by block, and for all of them together as a fraction of the divergence on texts that
it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compile_steer.artifacts.files import save_record
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import Behaviour
from compile_steer.export.adapter import PATCH_FILE, read_patch
from compile_steer.export.merged import merged_model
from compile_steer.formats.lora import ADAPTER_CONFIG
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel, frozen
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload
from compile_steer.models.tokens import Batch, batches, encode
from compile_steer.pipeline.run import Run
from compile_steer.steering.hooks import PAD
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site

# A block that changes its output by less than this, relative to the stream, was not changed.
_UNCHANGED = 1e-6


@dataclass(frozen=True)
class BlockChange:
    """What one block was changed to do."""

    layer: int
    norm: float  # of the constant
    relative_size: float  # root mean square of the whole change, relative to the stream
    explained: float  # fraction of the squared change that the constant explains


@dataclass(frozen=True)
class Decompiled:
    """The program, its blocks, and on texts it was not fitted to KL(other||base) and KL(other||base under the program)."""

    program: Program
    blocks: list[BlockChange]
    kl_base: float
    kl_left: float

    @property
    def explained(self) -> float:
        return 1.0 - self.kl_left / self.kl_base

    def summary(self) -> dict[str, Any]:
        """Everything but the vectors, as JSON."""
        content = {**vars(self), "blocks": [asdict(block) for block in self.blocks], "explained": self.explained}
        return {name: value for name, value in content.items() if name != "program"}


def decompile_artifact(run: Run, folder: Path) -> Decompiled:
    """Decompile the adapter or checkpoint at `folder`, and leave the program and its report in the run's folder."""
    distributed.require_alone("decompilation")
    decompiled = decompile(run.model, _fine_tuned(folder, run.model), run.data, run.progress)
    decompiled.program.save(run.paths.decompiled)
    save_record(run.paths.decompiled.with_suffix(".json"), decompiled.summary())
    return decompiled


def _fine_tuned(folder: Path, base: LoadedModel) -> LoadedModel:
    """The checkpoint at `folder`, or `base` with the adapter or patch there merged in; raises `ArtifactError`."""
    if not any((folder / name).is_file() for name in (PATCH_FILE, ADAPTER_CONFIG)):
        return reload(folder, base)
    # Read as audit and export read it: PEFT ignores what it does not know, and starts what is missing at random.
    patch = read_patch(folder)
    try:
        model = merged_model(base.source, patch)
    except ArtifactError as error:
        raise ArtifactError([f"{folder}: {problem}" for problem in error.problems]) from error
    for parameter in model.parameters():  # not the buffers, which are kept in fp32
        parameter.data = parameter.data.to(base.model.dtype)
    Layout.share(base.model, model)
    return replace(base, model=frozen(model, base.device), id=str(folder), source=str(folder))


def decompile(base: LoadedModel, other: LoadedModel, behaviour: Behaviour, progress: Progress) -> Decompiled:
    """Fit the program on both sides of the training pairs, and measure it on the control text.

    Raises:
        ArtifactError: the models have other shapes, or behave alike, so that there is nothing to explain.
    """
    shapes = [(model.layout.n_layers, model.layout.d_model) for model in (base, other)]
    if shapes[0] != shapes[1]:
        raise ArtifactError(
            f"{other.id} has {shapes[1][0]} blocks of width {shapes[1][1]}, the base {shapes[0][0]} of {shapes[0][1]}; "
            "needed: a fine-tuned copy of the base, or an adapter for it."
        )
    texts = [side for pair in behaviour.train for side in (pair.positive, pair.negative)]
    inputs = list(batches(base, [encode(base.tokenizer, text) for text in texts]))
    streams: list[Tensor | None] = [None] * len(inputs)  # None: the embeddings
    changes: list[tuple[Tensor, BlockChange]] = []
    with progress.phase("block by block: what was changed", base.layout.n_layers) as advance:
        for layer in range(base.layout.n_layers):
            streams, vector, change = _block_change(base, other, inputs, streams, layer)
            if change.relative_size > _UNCHANGED:
                changes.append((vector, change))
            advance(1)
    if not changes:
        raise ArtifactError(f"{other.id} computes what its base does at every block; there is nothing to decompile.")
    interventions = (Intervention(Site(change.layer), "add", vector) for vector, change in changes)
    program = Program(tuple(interventions), base.id, base.revision)
    neutral = [encode(base.tokenizer, text) for text in behaviour.neutral]
    changed = final_states(other, neutral).response
    plain, under = (final_states(base, neutral, applied).response for applied in (None, program))
    kl_base, kl_left = (divergence(other.model, changed, base.model, states).mean for states in (plain, under))
    return Decompiled(program, [change for _vector, change in changes], kl_base, kl_left)


def _block_change(
    base: LoadedModel, other: LoadedModel, inputs: Sequence[Batch], streams: Sequence[Tensor | None], layer: int
) -> tuple[list[Tensor | None], Tensor, BlockChange]:
    """Run one block of both models on the other's stream: the other's outputs, the mean difference [d_model], its size."""
    # In fp64: many thousand tokens are summed, and what is sought may be far smaller than the stream.
    total = torch.zeros(base.layout.d_model, dtype=torch.float64, device=base.device)
    weights = squares = 0.0
    n_tokens = 0
    outputs: list[Tensor | None] = []
    for batch, stream in zip(inputs, streams, strict=True):
        with torch.no_grad():
            changed, plain = (
                run_blocks(
                    model.model, batch.input_ids, batch.attention_mask, start=layer, stop=layer + 1, hidden=stream
                )
                for model in (other, base)
            )
        real = batch.roles != PAD
        difference = (changed - plain)[real].double()
        # The stream's norm differs a lot between tokens; the weights make every token count alike.
        weight = 1.0 / plain[real].double().square().sum(dim=1).clamp(min=1e-12)
        total += weight @ difference
        weights += float(weight.sum())
        squares += float((weight * difference.square().sum(dim=1)).sum())
        n_tokens += int(real.sum())
        outputs.append(changed)
    mean = total / weights
    explained = float(mean.square().sum()) * weights / squares if squares > 0 else 0.0
    change = BlockChange(layer, float(mean.norm()), (squares / n_tokens) ** 0.5, explained)
    return outputs, mean.float().cpu(), change
