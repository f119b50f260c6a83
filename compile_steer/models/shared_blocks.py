"""The lower blocks that a base, its steered form and its artifacts have in common: run once for each batch of texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.models.forward import run_blocks, settings_of
from compile_steer.models.load import LoadedModel
from compile_steer.models.packing import PackedBatch
from compile_steer.steering.hooks import steered
from compile_steer.steering.layout import Layout
from compile_steer.steering.program import Program


class SharedBlocks:
    """The hidden states that blocks 0 .. `stop`-1 of a base hand on, of every batch that was asked for.

    They serve each model whose lower blocks are the base's own memory, see `reload.share_equal`. That is looked at anew at every
    use, so that other weights, put there in the meantime, are never taken for the base's.
    """

    def __init__(self, base: LoadedModel, stop: int) -> None:
        self._base, self.stop = base, stop
        self._own = self._lower(base.model)
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def serve(self, model: nn.Module) -> bool:
        """Whether the lower blocks of `model` compute what the base's do, and these what they did at first."""
        return bool(self._own) and all(self._lower(one) == self._own for one in {model, self._base.model})

    def _lower(self, model: nn.Module) -> dict[str, object]:
        """What the lower blocks compute with: where each parameter lies, the buffers' values, and the configuration."""
        layout = Layout.of(model)
        above = {id(one) for block in layout.blocks[self.stop :] for one in block.modules()}
        lower = {name: one for name, one in layout.backbone.named_modules() if id(one) not in above}
        # Whoever has put a hook there, or a forward of its own, has another model than its weights say. What is handed on
        # passes the hooks on the next block's input.
        hooked = any(one._forward_hooks or one._forward_pre_hooks or "forward" in vars(one) for one in lower.values())
        if hooked or layout.blocks[self.stop]._forward_pre_hooks:
            return {}
        parameters = {f"{at}.{n}": p for at, one in lower.items() for n, p in one.named_parameters(recurse=False)}
        if any(value.is_meta for value in parameters.values()):
            return {}  # weights that are read from a disk have no place
        buffers = {f"{at}.{n}": b.tolist() for at, one in lower.items() for n, b in one.named_buffers(recurse=False)}
        places = {name: (p.data_ptr(), p.dtype, p.shape, p.stride()) for name, p in parameters.items()}
        return {**places, **buffers, "settings": settings_of(layout.model), "class": type(layout.backbone)}

    def hidden(self, batch: PackedBatch) -> Tensor:
        """The input of block `stop`, [rows, time, d_model]."""
        read = batch.input_ids, *batch.paths.values()  # which tokens each one sees is in the paths
        key = tuple(part for tensor in read for part in (tensor.shape, tensor.cpu().numpy().tobytes()))
        if key not in self._kept:
            self._kept[key] = _run(self._base, batch, stop=self.stop)
        return self._kept[key]


def final_hidden(loaded: LoadedModel, batch: PackedBatch, program: Program | None = None) -> Tensor:
    """Final hidden states of a batch, [rows, time, d_model], steered by `program` if given; without gradients."""
    below, start, hidden = loaded.below, 0, None
    if below and (program is None or program.first_layer >= below.stop) and below.serve(loaded.model):
        start, hidden = below.stop, below.hidden(batch)
    with steered(loaded.model, program, roles=batch.roles):
        return _run(loaded, batch, start=start, hidden=hidden)


@torch.no_grad()
def _run(loaded: LoadedModel, batch: PackedBatch, **span: Any) -> Tensor:
    return run_blocks(loaded.model, batch.input_ids, batch.attention_mask, position_ids=batch.position_ids, **span)
