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
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common.distributed import count
from compile_steer.common.progress import Advance
from compile_steer.lowering.block_pass import products, recorded, run_student
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.low_rank import LowRank, linear_shape

_SIZE = 30.0  # of the pair's mean square beside other neurons': a ridge takes next to nothing from what is larger
_LEAST_USED = 32  # one pair in so many may be taken: two adapters in one block should not take the same
_ROUNDING = 0.03  # relative, that the identity above may be missed by: bfloat16 misses it by up to a hundredth

Edits = dict[str, LowRank]


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the MLP's input: one row for each neuron, from row `first` on of the module `name`."""

    name: str
    first: int = 0

    def of(self, output: Tensor, d_mlp: int) -> Tensor:
        """Its part of what the module writes, [..., d_mlp]."""
        return output[..., self.first : self.first + d_mlp]


@dataclass(frozen=True)
class GatedMLP:
    """The matrices of a block's MLP; gate and up may be halves of one module."""

    block: int
    gate: Reader
    up: Reader
    down: str

    @staticmethod
    def of(models: TeacherStudent, block: int, down: str) -> GatedMLP | None:
        """The MLP of a block whose output projection is `down`; None where it computes something else, which running it tells."""
        layout, activations = models.loaded.layout, models.batches[0]
        d_model, d_mlp = linear_shape(layout.model.get_submodule(down))
        readers = []
        for name, module in ((name, layout.model.get_submodule(name)) for name in layout.linears(block)):
            d_out, d_in = linear_shape(module)
            if d_in == d_model and d_out in (d_mlp, 2 * d_mlp) and getattr(module, "bias", None) is None:
                readers += [Reader(name, first) for first in range(0, d_out, d_mlp)]

        def run(negated: Reader | None = None) -> dict[str, Tensor]:
            def negate(reader: Reader, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                output = output.clone()
                reader.of(output, d_mlp).neg_()
                return output

            with ExitStack() as stack, torch.no_grad():
                if negated:
                    module = layout.model.get_submodule(negated.name)
                    stack.callback(module.register_forward_hook(partial(negate, negated)).remove)
                calls = stack.enter_context(recorded(layout.model, [*{reader.name for reader in readers}, down]))
                models.run_block(activations.batch, activations.student, block)
            return {name: call[0 if name == down else 1].flatten(0, -2) for name, call in calls.items()}

        plain = run()
        for gate, up in permutations([reader for reader in readers if reader.name in plain], 2):
            product = gate.of(plain[gate.name], d_mlp) * up.of(plain[up.name], d_mlp)
            difference = plain[down] - run(gate)[down]
            if float((difference - product).norm()) <= _ROUNDING * float(product.norm()):
                return GatedMLP(block, gate, up, down)
        return None


@dataclass(frozen=True)
class NeuronPair:
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
    def of(models: TeacherStudent, mlp: GatedMLP, advance: Advance) -> NeuronPair:
        """Run the student through the block twice: for what tells the change linearly, and for its product with the norm."""
        fitter, factor = _streamed(models, mlp, lambda z: z, advance)
        edit, _penalty, _helps = fitter.fit(1, to_all=False)
        read = factor * edit.A[:, -models.loaded.layout.d_model :].float()
        fitter, factor = _streamed(models, mlp, lambda z: (z @ read.T) * z, advance)
        return NeuronPair(mlp, read, fitter, factor)

    def edits(self, models: TeacherStudent, *, to_all: bool) -> tuple[Edits, LowRank]:
        """The edits of gate and up projection, and that of the down projection that takes the two neurons' columns away.

        Until the down projection is solved the pair writes nothing.
        """
        d_mlp, total = len(self.fitter.train.G) - self.read.shape[1], self.fitter.train + self.fitter.held_out
        edit, _penalty, _helps = self.fitter.fit(1, to_all=to_all)
        own = edit.A[:, d_mlp:]
        written, sizes = float(own @ total.G[d_mlp:, d_mlp:] @ own.T), total.G.diagonal()[:d_mlp]
        gate, read = self.factor * own.float(), self.read
        # Rows of one norm, and a pair that is large beside the other neurons.
        size = (_SIZE * float(sizes.mean()) / max(written, 1e-30)) ** 0.5
        norm = (size * float(gate.norm()) * float(read.norm())) ** 0.5
        gate, read = (norm * row / row.norm().clamp(min=1e-30) for row in (gate, read))
        least = sizes.argsort()[: 2 * max(1, d_mlp // (2 * _LEAST_USED))].view(-1, 2)
        neurons = least[int(models.program.sha256, 16) % len(least)]
        rows, picks = _rows(models, self.mlp, neurons), _units(neurons, d_mlp)
        columns = products(models, self.mlp.block, [self.mlp.down], picks)[self.mlp.down]
        edits: Edits = {}
        for reader, new in ((self.mlp.gate, torch.cat([gate, -gate])), (self.mlp.up, torch.cat([read, read]))):
            shape = linear_shape(models.loaded.layout.model.get_submodule(reader.name))
            edit = LowRank(_units(neurons + reader.first, shape[0]), new - rows[reader])
            edits[reader.name] = edits[reader.name] + edit if reader.name in edits else edit
        return edits, LowRank(-columns, picks.T.contiguous())


def _units(numbers: Tensor, size: int) -> Tensor:
    """The unit vectors of these numbers as columns, [size, n]."""
    return nn.functional.one_hot(numbers, size).T.float().contiguous()


def _streamed(
    models: TeacherStudent, mlp: GatedMLP, more: Callable[[Tensor], Tensor], advance: Advance
) -> tuple[RidgeFitter, float]:
    """The sums of what the block's output lacks on the neurons and on `more` of the MLP's input z, and the factor that `more`
    is multiplied by to be as large as the neurons."""
    layout = models.loaded.layout
    d_model, d_mlp = linear_shape(layout.model.get_submodule(mlp.down))
    fitter = RidgeFitter(d_mlp + d_model, d_model, layout.device_of(mlp.block))
    for tokens in run_student(models, mlp.block, [mlp.gate.name, mlp.down]):
        inputs = torch.cat([tokens.calls[mlp.down].input, more(tokens.calls[mlp.gate.name].input)], dim=1)
        fitter.update(inputs, tokens.missing, tokens.weight, tokens.held_out)
        advance(len(tokens.batch.rows) * count())
    fitter.exchange()
    return fitter, fitter.resize(slice(d_mlp, None), slice(d_mlp))


def _rows(models: TeacherStudent, mlp: GatedMLP, neurons: Tensor) -> dict[Reader, Tensor]:
    """The neurons' rows of gate and up projection, [n, d_model]: by the modules' own code, as in `products`."""
    rows: dict[Reader, Tensor] = {}

    def read(reader: Reader, module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        with torch.enable_grad():  # a row is the gradient of its output
            inputs = args[0].new_zeros(len(neurons), args[0].shape[-1], requires_grad=True)
            numbers = (neurons + reader.first).to(inputs.device)
            outputs = module.forward(inputs).gather(1, numbers.unsqueeze(1)).sum()
            rows[reader] = torch.autograd.grad(outputs, inputs)[0].float()

    activations = models.batches[0]
    with ExitStack() as stack, torch.no_grad():
        for reader in (mlp.gate, mlp.up):
            module = models.loaded.layout.model.get_submodule(reader.name)
            stack.callback(module.register_forward_hook(partial(read, reader)).remove)
        models.run_block(activations.batch, activations.student, mlp.block)
    return rows
