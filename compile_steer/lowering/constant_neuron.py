"""A neuron of an MLP that is the same at every token, for a constant that is added to all of them.

A linear read r of the MLP's input z that is fitted to be 1 at every token misses it by a few hundredths. A gated MLP,
y = W_down (act(W_gate z) * (W_up z)), makes more of it: a neuron with the rows a r and r computes

    f(r) = r act(a r)

and where a act(a) has its maximum over negative a (at -2.22 for SiLU, -1.19 for GELU), f does not change with r to first order:
what r misses by a hundredth f misses by a ten-thousandth. One neuron that is hardly used is taken for it,
and its output column is the constant: three edits of rank 1. ReLU has no such maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.common.distributed import sum_over_all
from compile_steer.lowering.block_pass import run_student
from compile_steer.lowering.neurons import Edits, GatedMLP, size_beside, take_neurons
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.low_rank import LowRank

_LOWEST = -8.0  # gates that are looked at, up to 0
_LEAST = 0.01  # what a act(a) has to reach: 0.48 for SiLU, 0.14 for GELU
_SIZE = 300.0  # of the neuron's mean square beside the others': neither what it computes nor its column is an outlier


@dataclass(frozen=True)
class ConstantNeuron:
    """The regression that finds the read; sums over tokens are those of all processes.

    Attributes:
        gate: a above. value: f(1).
        fitter: its input is z, its output 1.
        sizes: weighted squares of the neurons, [d_mlp]. weight: what all tokens count together.
    """

    mlp: GatedMLP
    gate: float
    value: float
    fitter: RidgeFitter
    sizes: Tensor
    weight: Tensor

    @staticmethod
    def of(models: TeacherStudent, mlp: GatedMLP) -> ConstantNeuron | None:
        """Run the student through the block once; None where the MLP's activation has no such maximum."""
        gate, value = _turning_point(models, mlp)
        if gate * value < _LEAST:
            return None
        layout = models.loaded.layout
        fitter, squares, weights = RidgeFitter(layout.d_model, 1, layout.device_of(mlp.block)), [], []
        for own in run_student(models, mlp.block, [mlp.gate.name, mlp.down]):
            z = own.calls[mlp.gate.name].input
            one = torch.ones_like(z[:, 0])
            fitter.update(z, one.unsqueeze(1), one, own.held_out)
            squares.append(own.weight @ own.calls[mlp.down].input.square())
            weights.append(own.weight.sum())
        sizes, weight = (torch.stack(parts).double().sum(dim=0) for parts in (squares, weights))
        fitter.exchange()
        sum_over_all(sizes, weight)
        return ConstantNeuron(mlp, gate, value, fitter, sizes, weight)

    def edits(self, models: TeacherStudent, *, to_all: bool) -> tuple[Edits, LowRank]:
        """The edits that make the neuron (see `take_neurons`)."""
        edit, _penalty, _helps = self.fitter.fit(1, to_all=to_all)
        read = (edit.B @ edit.A).float()
        size = size_beside(self.sizes, _SIZE, float(self.weight))
        return take_neurons(models, self.mlp, self.sizes, self.gate * read, size / self.value * read)

    def column(self, models: TeacherStudent, pick: Tensor, *, to_all: bool) -> Tensor:
        """The neuron's output column, [d_model, 1]: the least squares of what the block's output lacks.

        Args:
            pick: 1 at the neuron, [1, d_mlp]; the student has its edits, and no column yet.
        """
        layout = models.loaded.layout
        fitter = RidgeFitter(1, layout.d_model, layout.device_of(self.mlp.block))
        for own in run_student(models, self.mlp.block, [self.mlp.down]):
            fitter.update(own.calls[self.mlp.down].input @ pick.T, own.missing, own.weight, own.held_out)
        fitter.exchange()
        total = fitter.train + fitter.held_out if to_all else fitter.train
        written = layout.sublayer(self.mlp.block, "mlp").multiplier * total.G
        return (total.C / written).T.float()


def _turning_point(models: TeacherStudent, mlp: GatedMLP) -> tuple[float, float]:
    """(a, act(a)) at the maximum of a act(a) over negative gates a."""
    low, high = _LOWEST, 0.0
    for _finer in range(3):
        gates = torch.linspace(low, high, mlp.width)
        values = mlp.activation(models, gates)
        best = int((gates * values).argmax())
        low, high = (float(gates[min(max(n, 0), len(gates) - 1)]) for n in (best - 1, best + 1))
    return float(gates[best]), float(values[best])
