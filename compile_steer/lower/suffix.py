"""What teacher and student do not share: the blocks from the first edited one on, over batches whose prefix is kept.

Teacher and student are the same weights: the teacher runs with the hooks on, the student with the patch on. Below
the first block that either changes they compute the same thing, so that prefix is run once a text and kept, and so
is what the teacher hands on; what is repeated is the student's suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compile_steer.lower.teacher_student import run_block
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence
from compile_steer.models.tokens import Batch, Encoded, batches
from compile_steer.steering.hooks import PAD, steered
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Item:
    """One batch with what the prefix [batch, time, d_model] and the teacher [n_tokens, d_model] gave for it."""

    batch: Batch
    prefix: Tensor | None
    teacher: Tensor


@dataclass(frozen=True)
class Suffix:
    """Blocks `first` to `stop` - 1 (None: all, and the final norm).

    Of one block in `recompute_every` (0: of none) the student keeps the input alone and computes the rest again for the
    gradient; with `dtype` bfloat16 its matrix products are rounded (autocast), its patch is not.
    """

    loaded: LoadedModel
    program: Program
    first: int
    stop: int | None = None
    recompute_every: int = 0
    dtype: torch.dtype = torch.float32

    def items(self, texts: Sequence[Encoded], max_tokens: int) -> list[Item]:
        """The texts in batches, with the teacher's states."""
        return [self.item(batch) for batch in batches(self.loaded, texts, max_tokens=max_tokens)]

    def item(self, batch: Batch) -> Item:
        """One batch, its prefix and what the teacher hands on."""
        model, ids, mask = self.loaded.model, batch.input_ids, batch.attention_mask
        with torch.no_grad():
            prefix = run_blocks(model, ids, mask, stop=self.first) if self.first else None
            with steered(model, self.program, roles=batch.roles):
                teacher = run_blocks(model, ids, mask, start=self.first, stop=self.stop, hidden=prefix)
        return Item(batch, prefix, teacher[batch.roles != PAD])

    def student(self, item: Item) -> Tensor:
        """What the student hands on for the real tokens, [n_tokens, d_model]; its patch must be on."""
        batch = item.batch
        with torch.autocast(self.loaded.device.type, self.dtype, enabled=self.dtype != torch.float32):
            handed_on = self._in_pieces(item) if self.recompute_every else self._run(batch, item.prefix, self.first)
        return handed_on[batch.roles != PAD]

    def _run(self, batch: Batch, hidden: Tensor | None, start: int) -> Tensor:
        model = self.loaded.model
        return run_blocks(model, batch.input_ids, batch.attention_mask, start=start, stop=self.stop, hidden=hidden)

    def _in_pieces(self, item: Item) -> Tensor:
        hidden = item.prefix
        last = (self.loaded.layout.n_layers if self.stop is None else self.stop) - 1
        for block in range(self.first, last):
            run = partial(run_block, self.loaded, item.batch, block=block)
            again = (last - block) % self.recompute_every == 0
            hidden = checkpoint(run, hidden, use_reentrant=False) if again else run(hidden)
        return cast(Tensor, checkpoint(self._run, item.batch, hidden, last, use_reentrant=False))

    def mean_kl(self, items: Sequence[Item], patch: WeightPatch) -> float:
        """Mean KL(teacher || student) over the items' real tokens, nats a token; the suffix must reach the end."""
        total = count = 0.0
        for item in items:
            with with_patch(self.loaded.model, patch), torch.no_grad():
                student = self.student(item)
            found = divergence(self.loaded.model, item.teacher, self.loaded.model, student)
            total += float(found.kl.sum())
            count += len(found.kl)
        return total / count
