"""A gated MLP, and some of its neurons taken for another use.

In y = W_down (act(W_gate z) * (W_up z)) a neuron is a row of W_gate, one of W_up and a column of W_down. Those that are hardly used
get rows of their own here; what they write is found by the regression that solves W_down.

The artifact's scale is no dial then: what such neurons compute is no multiple of it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.lowering.block_pass import batch_with_texts, products, recorded
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.low_rank import LowRank, linear_shape

_LEAST_USED = 32  # one neuron in so many may be taken: two adapters in one block should not take the same
_ROUNDING = 0.03  # relative, that a negated gate may be missed by: bfloat16 misses it by up to a hundredth

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
    """The matrices of a block's MLP of `width` neurons; gate and up may be halves of one module."""

    block: int
    gate: Reader
    up: Reader
    down: str
    width: int

    @staticmethod
    def of(models: TeacherStudent, block: int, down: str) -> GatedMLP | None:
        """The MLP of a block whose output projection is `down`; None where it computes something else, which running it tells."""
        layout, activations = models.loaded.layout, batch_with_texts(models)
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
                return GatedMLP(block, gate, up, down, d_mlp)
        return None

    def activation(self, models: TeacherStudent, gates: Tensor) -> Tensor:
        """act(gates), [width]: what the neurons compute where the gates are these, [width], and all of up is 1."""
        model, activations = models.loaded.layout.model, batch_with_texts(models)

        def replace(values: Tensor, reader: Reader, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            reader.of(output, self.width)[...] = values.to(output)
            return output

        with ExitStack() as stack, torch.no_grad():
            for reader, values in ((self.gate, gates), (self.up, torch.ones_like(gates))):
                hook = partial(replace, values, reader)
                stack.callback(model.get_submodule(reader.name).register_forward_hook(hook).remove)
            calls = stack.enter_context(recorded(model, [self.down]))
            models.run_block(activations.batch, activations.student, self.block)
        return calls[self.down][0].flatten(0, -2)[0].float().cpu()


def size_beside(sizes: Tensor, times: float, square: float) -> float:
    """The factor that makes a weighted `square` so many times the mean of the neurons', `sizes` [d_mlp]: a ridge takes next to
    nothing from what is larger."""
    return float((times * float(sizes.mean()) / max(square, 1e-30)) ** 0.5)


def take_neurons(
    models: TeacherStudent, mlp: GatedMLP, sizes: Tensor, gates: Tensor, reads: Tensor
) -> tuple[Edits, LowRank]:
    """Edits of gate and up projection that give some of the least used neurons these rows, and one that takes their columns away.

    Until the down projection is solved they write nothing.

    Args:
        sizes: mean squares of what the neurons hand to the down projection, [d_mlp].
        gates, reads: rows of gate and up projection, [n, d_model].
    """
    n = len(gates)
    least = sizes.argsort()[: n * max(1, mlp.width // (n * _LEAST_USED))].view(-1, n)
    neurons = least[int(models.program.sha256, 16) % len(least)]
    rows, picks = _rows(models, mlp, neurons), _units(neurons, mlp.width)
    columns = products(models, mlp.block, [mlp.down], picks)[mlp.down]
    edits: Edits = {}
    for reader, new in ((mlp.gate, gates), (mlp.up, reads)):
        shape = linear_shape(models.loaded.layout.model.get_submodule(reader.name))
        edit = LowRank(_units(neurons + reader.first, shape[0]), new - rows[reader])
        edits[reader.name] = edits[reader.name] + edit if reader.name in edits else edit
    return edits, LowRank(-columns, picks.T.contiguous())


def _units(numbers: Tensor, size: int) -> Tensor:
    """The unit vectors of these numbers as columns, [size, n]."""
    return nn.functional.one_hot(numbers, size).T.float().contiguous()


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
