"""Teacher (hooks on) and student (patch on), side by side at the boundary of one block after another.

Kept: two hidden states a token at the current boundary. The wide activations inside a block never are, no
block above the last wanted one is run at all, and the language-model head never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compile_steer.common.progress import Advance
from compile_steer.lower.work import Curve, Work
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Batch, Encoded, batches
from compile_steer.steering.hooks import PAD, steered
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program


@dataclass
class Flow:
    """A batch at a block's boundary, [batch, time, d_model] in both models; None before block 0.

    `target` is what the teacher's current block hands on.
    """

    batch: Batch
    teacher: Tensor | None
    student: Tensor | None
    target: Tensor

    @property
    def real(self) -> Tensor:
        """Boolean [batch, time]: tokens that are not padding."""
        return self.batch.roles != PAD


def run_block(loaded: LoadedModel, batch: Batch, hidden: Tensor | None, block: int) -> Tensor:
    """What `block` hands on for `hidden`, under the hooks and patches that are on; [batch, time, d_model]."""
    return run_blocks(loaded.model, batch.input_ids, batch.attention_mask, start=block, stop=block + 1, hidden=hidden)


@dataclass
class Walk:
    """The state of a walk: the edits so far by module name, and the curves of what was trained on the way."""

    program: Program
    loaded: LoadedModel
    flows: list[Flow]
    solved: dict[str, LowRank] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)

    @staticmethod
    def start(
        program: Program, loaded: LoadedModel, texts: Sequence[Encoded], max_tokens: int, advance: Advance
    ) -> Walk:
        """Run the prefix that both models share, below the first intervened block."""
        first = program.first_layer
        flows = []
        for batch in batches(loaded, texts, max_tokens=max_tokens):
            with torch.no_grad():
                hidden = run_blocks(loaded.model, batch.input_ids, batch.attention_mask, stop=first) if first else None
            flows.append(Flow(batch, hidden, hidden, torch.empty(0)))
            advance(len(batch.rows))
        return Walk(program, loaded, flows)

    @property
    def patch(self) -> WeightPatch:
        return WeightPatch(dict(self.solved))

    def keep(self, work: Work, name: str, block: int) -> None:
        """Keep what is solved, before `block`."""
        tensors = {f"{part}.{module}": getattr(edit, part) for module, edit in self.solved.items() for part in "BA"}
        work.keep(name, tensors, {"block": block, "curves": self.curves})

    def restore(self, work: Work, name: str) -> int:
        """Take over what was kept; returns the block that it goes on with, 0 where nothing was kept."""
        found = work.kept(name)
        if found is None:
            return 0
        tensors, state = found
        for place in tensors:
            if place.startswith("B."):
                module = place[2:]
                edit = LowRank(tensors[place], tensors[f"A.{module}"])
                self.solved[module] = edit.to(self.loaded.device)
        self.curves.update(state["curves"])
        return int(state["block"])

    def aim(self, block: int) -> None:
        """Run the teacher through `block`."""
        for flow in self.flows:
            with steered(self.loaded.model, self.program, roles=flow.batch.roles), torch.no_grad():
                flow.target = run_block(self.loaded, flow.batch, flow.teacher, block)

    def advance(self, block: int) -> None:
        """Run the patched student through `block`, and stand at the next boundary."""
        with with_patch(self.loaded.model, self.patch), torch.no_grad():
            for flow in self.flows:
                flow.student = run_block(self.loaded, flow.batch, flow.student, block)
                flow.teacher = flow.target
