"""A pair of an MLP's neurons that tells roles, for a constant that is added to some tokens alone, as to responses.

A linear read-out of the token's role has to be near 1 at every token of the role and near 0 at all others, but all that the model
holds is which of both is the likelier. A gated MLP, y = W_down (act(W_gate z) * (W_up z)), has the nonlinearity that is missing:

    act(s + b) - act(s - b)

rises from 0 to 2 b around s = 0 for SiLU, GELU and ReLU. With the log-odds of a logistic regression on z, the MLP's input, for
s, and a least-squares fit of the constant 1, two neurons therefore compute a step.

What the attention hands to its projection tells roles better than z does. Where z holds what the projection writes, the projection
is made to write these log-odds into the stream, along a direction in which z varies little and to which the MLP hardly answers,
and a third neuron, linear in its read, is there to take them away again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common.distributed import sum_over_all
from compile_steer.lowering.block_pass import batch_with_texts, products, real_tokens, recorded, run_student
from compile_steer.lowering.neurons import Edits, GatedMLP, size_beside, take_neurons
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.compare import tolerance_of
from compile_steer.steering.hooks import PAD, in_scope
from compile_steer.steering.layout import OutputProjection
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.sites import Scope

_SIZE = 3000.0  # of the mean square of what the neurons compute beside the others'
_PENALTY = 1e-3  # of the squared norm of the log-odds' weights, for inputs with a mean square of 1
_NEWTON_STEPS = 10  # the last ones change nothing that float32 holds
_SHARPNESS = 4.0  # s is the log-odds times this
_HALF_WIDTH = 8.0  # b: the step rises between log-odds of -2 and 2
_WRITTEN = 4.0  # standard deviation of the log-odds in z, beside that of what else is read there
_STRAY = 0.02  # what a direction counts by itself beside the MLP's answer to it: most of it is taken away again


@dataclass(frozen=True)
class RolePair:
    """What the neurons are fitted to; sums over tokens are those of all processes.

    Attributes:
        a, z: the inputs of the attention's projection and of the MLP at this process's tokens, [n, d_attn] and [n, d_model].
        weight: what an error at each token counts, [n].
        chosen, held_out: boolean [n], the tokens of the role, and those of texts that choose.
        sizes: weighted squares of the neurons, [d_mlp].
        response: how much z moves with what the attention's projection writes, [d_model]; 0 where it reads nothing of it.
    """

    mlp: GatedMLP
    attn: str
    a: Tensor
    z: Tensor
    weight: Tensor
    chosen: Tensor
    held_out: Tensor
    sizes: Tensor
    response: Tensor

    @staticmethod
    def of(models: TeacherStudent, mlp: GatedMLP, attn: OutputProjection, scopes: frozenset[Scope]) -> RolePair:
        """Run the student through the block once."""
        tokens, sizes = [], []
        for own in run_student(models, mlp.block, [attn.name, mlp.gate.name, mlp.down]):
            roles = own.batch.roles[own.batch.roles != PAD].to(own.weight.device)
            inputs = own.calls[attn.name].input, own.calls[mlp.gate.name].input
            tokens.append((*inputs, own.weight, in_scope(roles, scopes), own.held_out))
            sizes.append(own.weight @ own.calls[mlp.down].input.square())
        a, z, weight, chosen, held_out = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        total = _summed(torch.stack(sizes).double().sum(dim=0))
        response = _response(models, mlp, attn.name)
        return RolePair(mlp, attn.name, a, z, weight, chosen, held_out, total, response)

    @property
    def variants(self) -> list[RolePair]:
        """This, and the pair alone: where attention knows no more, what it writes is noise."""
        alone = replace(self, response=torch.zeros_like(self.response))
        return [self, alone] if self.reads_attention else [self]

    @property
    def reads_attention(self) -> bool:
        """Whether the MLP's input holds what the attention's projection writes."""
        return bool(self.response.any())

    def edits(self, models: TeacherStudent, *, to_all: bool) -> tuple[Edits, Edits]:
        """The edits that make the neurons and what they read, and those of them that stay when a projection is solved."""
        weight = self.weight if to_all else self.weight * ~self.held_out
        if not self.reads_attention:
            edits, without_columns = self._neurons(models, weight, self.z, None)
            return edits, {self.mlp.down: without_columns}
        writer = self._writer(models, weight)
        earlier = models.solved
        models.solved = {**earlier, self.attn: writer}
        z = torch.cat(
            [own.calls[self.mlp.gate.name].input for own in run_student(models, self.mlp.block, [self.mlp.gate.name])]
        )
        models.solved = earlier
        edits, without_columns = self._neurons(models, weight, z, (self.a @ writer.A.T)[:, 0])
        return {**edits, self.attn: writer}, {self.attn: writer, self.mlp.down: without_columns}

    def _neurons(
        self, models: TeacherStudent, weight: Tensor, z: Tensor, written: Tensor | None
    ) -> tuple[Edits, LowRank]:
        """Of the MLP's input z [n, d_model]: the pair, and one that reads what was `written` [n] (see `take_neurons`)."""
        gram = _gram(z, weight)
        constant = _least_squares(z, gram, weight, torch.ones_like(weight))
        middle, half = _SHARPNESS * _log_odds(z, gram, weight, self.chosen), _HALF_WIDTH * constant

        def size(squares: Tensor) -> float:
            return size_beside(self.sizes, _SIZE, float(_summed(self.weight @ squares)))

        step = size(self.chosen.float()) / (2 * _HALF_WIDTH) * constant
        gates, reads = [middle + half, middle - half], [step, step]
        if written is not None:
            gates.append(half)
            reads.append(size(written.square()) / _HALF_WIDTH * _least_squares(z, gram, weight, written))
        return take_neurons(models, self.mlp, self.sizes, torch.stack(gates), torch.stack(reads))

    def _writer(self, models: TeacherStudent, weight: Tensor) -> LowRank:
        """The edit of the attention's projection that writes the role's log-odds."""
        odds = _log_odds(self.a, _gram(self.a, weight), weight, self.chosen)
        values, total = self.a @ odds, float(_summed(weight.sum()))
        mean = float(_summed(weight @ values)) / total
        spread = (float(_summed(weight @ (values - mean).square())) / total) ** 0.5
        # z moves by r u with a direction u that is written: the u that a linear read of z tells best, for as little answer of the MLP.
        r = torch.diag(self.response)
        noise = (_gram(self.z, weight) / total).cpu()
        signal = r @ torch.linalg.inv(noise + _PENALTY * _mean_square(noise)) @ r
        readers = products(models, self.mlp.block, sorted({self.mlp.gate.name, self.mlp.up.name}), torch.eye(len(r)))
        answer = r @ sum((rows.T @ rows).double().cpu() for rows in readers.values()) @ r
        answer = answer + _STRAY * _mean_square(answer)
        root = torch.linalg.cholesky(answer)
        half = torch.linalg.solve_triangular(root, signal, upper=False)
        _values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
        u = torch.linalg.solve_triangular(root.T, vectors[:, -1:], upper=True)
        u = u * _WRITTEN / max(spread * float(u.T @ signal @ u) ** 0.5, 1e-30)
        return LowRank(u.float().to(self.a.device), odds.unsqueeze(0))


def _response(models: TeacherStudent, mlp: GatedMLP, attn: str) -> Tensor:
    """How much each dimension of the MLP's input moves with the same one of what `attn` writes, [d_model] in float64."""
    model, activations = models.loaded.layout.model, batch_with_texts(models)
    noise: list[Tensor] = []

    def disturb(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise.append(torch.randn(output.shape, generator=generator).to(output) * 0.1 * output.float().std().to(output))
        return output + noise[0]

    with recorded(model, [mlp.gate.name]) as calls, torch.no_grad():
        models.run_block(activations.batch, activations.student, mlp.block)
        plain = calls[mlp.gate.name][0]
        handle = model.get_submodule(attn).register_forward_hook(disturb)
        try:
            models.run_block(activations.batch, activations.student, mlp.block)
        finally:
            handle.remove()
    passes = plain, calls[mlp.gate.name][0], noise[0]
    before, after, written = (real_tokens(values, activations.real) for values in passes)
    sums = torch.stack([((after - before) * written).sum(dim=0), written.square().sum(dim=0)]).double().cpu()
    moved = torch.tensor([(after - before).square().sum(), before.square().sum()], dtype=torch.float64)
    sum_over_all(sums, moved)
    if float(moved[0]) ** 0.5 < tolerance_of(model.dtype) * float(moved[1]) ** 0.5:
        return torch.zeros_like(sums[0])  # rounding
    response: Tensor = sums[0] / sums[1].clamp(min=1e-30)
    return response


def _least_squares(inputs: Tensor, gram: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The read of inputs [n, d] that is nearest to the target [n], [d]."""
    solution: Tensor = torch.linalg.solve(gram + _PENALTY * _mean_square(gram), _summed((weight * target) @ inputs))
    return solution.float()


def _log_odds(inputs: Tensor, gram: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """Logistic regression of the role on inputs [n, d], [d], by Newton's method."""
    penalty = 2 * _PENALTY * _mean_square(gram)
    solution = torch.zeros_like(penalty[0])
    for _step in range(_NEWTON_STEPS):
        likely = torch.sigmoid(inputs @ solution.float())
        slope = _summed((weight * (likely - chosen.float())) @ inputs)
        curvature = _gram(inputs, weight * likely * (1 - likely)) + penalty
        solution = solution - torch.linalg.solve(curvature, slope + penalty @ solution)
    return solution.float()


def _gram(inputs: Tensor, weight: Tensor) -> Tensor:
    """sum w x x^T over the tokens of all processes, [d, d] in float64."""
    return _summed((inputs * weight.unsqueeze(1)).T @ inputs)


def _summed(value: Tensor) -> Tensor:
    """The sum over all processes, in float64."""
    total = value.double()
    sum_over_all(total)
    return total


def _mean_square(gram: Tensor) -> Tensor:
    """The mean of the diagonal, as a multiple of the identity."""
    return gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
