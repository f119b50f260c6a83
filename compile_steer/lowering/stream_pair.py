"""A pair of an MLP's neurons that reads the stream, for a change that depends on it, as an ablation's does.

An output projection sees of the stream only what its own sublayer computes, so a regression on that has to guess how much of a
direction the stream holds. A gated MLP, y = W_down (act(W_gate z) * (W_up z)), reads z, which is the stream normalised, and

    act(a) - act(-a) = a

holds for SiLU, GELU and ReLU alike. Two neurons with the gates g.z and -g.z, the same read u.z, and the output columns b and -b
therefore write b (g.z) (u.z), exactly. u.z is what the normalised stream holds of the direction, and g.z, near the norm that it
was divided by, makes it what the stream itself holds. Two neurons that are hardly used are taken for it.

The artifact's scale is no dial then: what the pair writes grows with its third power.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.lowering.block_pass import run_student
from compile_steer.lowering.neurons import Edits, GatedMLP, size_beside, take_neurons
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.low_rank import linear_shape

_SIZE = 30.0  # of the pair's mean square beside other neurons': a ridge takes next to nothing from what is larger


@dataclass(frozen=True)
class StreamPair:
    """The regression that finds a pair, for what is missing most in the block's output.

    Attributes:
        read: u above, [1, d_model].
        fitter: its inputs are the neurons, [d_mlp], and then (u.z) z times `factor`, [d_model].
    """

    mlp: GatedMLP
    read: Tensor
    fitter: RidgeFitter
    factor: float

    @staticmethod
    def of(models: TeacherStudent, mlp: GatedMLP) -> StreamPair:
        """Run the student through the block twice: for what tells the change linearly, and for its product with the norm."""
        fitter, factor = _streamed(models, mlp, lambda z: z)
        edit, _penalty, _helps = fitter.fit(1, to_all=False)
        read = factor * edit.A[:, -models.loaded.layout.d_model :].float()
        fitter, factor = _streamed(models, mlp, lambda z: (z @ read.T) * z)
        return StreamPair(mlp, read, fitter, factor)

    @property
    def variants(self) -> list[StreamPair]:
        """The pairs to be tried."""
        return [self]

    def edits(self, models: TeacherStudent, *, to_all: bool) -> tuple[Edits, Edits]:
        """The edits that make the pair, and the one that stays when the MLP's projection is solved."""
        d_mlp, total = len(self.fitter.train.G) - self.read.shape[1], self.fitter.train + self.fitter.held_out
        edit, _penalty, _helps = self.fitter.fit(1, to_all=to_all)
        own = edit.A[:, d_mlp:]
        written, sizes = float(own @ total.G[d_mlp:, d_mlp:] @ own.T), total.G.diagonal()[:d_mlp]
        gate, read = self.factor * own.float(), self.read
        # Rows of one norm, and a pair that is large beside the other neurons.
        size = size_beside(sizes, _SIZE, written)
        norm = (size * float(gate.norm()) * float(read.norm())) ** 0.5
        gate, read = (norm * row / row.norm().clamp(min=1e-30) for row in (gate, read))
        gates, reads = torch.cat([gate, -gate]), torch.cat([read, read])
        edits, without_columns = take_neurons(models, self.mlp, sizes, gates, reads)
        return edits, {self.mlp.down: without_columns}


def _streamed(models: TeacherStudent, mlp: GatedMLP, more: Callable[[Tensor], Tensor]) -> tuple[RidgeFitter, float]:
    """The sums of what the block's output lacks on the neurons and on `more` of the MLP's input z, and the factor that `more`
    is multiplied by to be as large as the neurons."""
    layout = models.loaded.layout
    d_model, d_mlp = linear_shape(layout.model.get_submodule(mlp.down))
    fitter = RidgeFitter(d_mlp + d_model, d_model, layout.device_of(mlp.block))
    for tokens in run_student(models, mlp.block, [mlp.gate.name, mlp.down]):
        inputs = torch.cat([tokens.calls[mlp.down].input, more(tokens.calls[mlp.gate.name].input)], dim=1)
        fitter.update(inputs, tokens.missing, tokens.weight, tokens.held_out)
    fitter.exchange()
    return fitter, fitter.resize(slice(d_mlp, None), slice(d_mlp))
