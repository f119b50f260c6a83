"""A pair of an MLP's neurons that tells roles, for a constant that is added to some tokens alone, as to responses.

A linear read-out of the token's role has to be near 1 at every token of the role and near 0 at all others, but all that the model
holds is which of both is the likelier. A gated MLP, y = W_down (act(W_gate z) * (W_up z)), has the nonlinearity that is missing:

    act(s + b) - act(s - b)

rises from 0 to 2 b around s = 0 for SiLU, GELU and ReLU. With the log-odds of a logistic regression on z, the MLP's input, for
s, and a least-squares fit of the constant 1, two neurons therefore compute a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compile_steer.common.distributed import sum_over_all
from compile_steer.lowering.block_pass import run_student
from compile_steer.lowering.neurons import Edits, GatedMLP, take_neurons
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.hooks import PAD, in_scope
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.sites import Scope

_SIZE = 3000.0  # of the mean square of the pair's step beside the neurons'
_PENALTY = 1e-3  # of the squared norm of the log-odds' weights, for inputs with a mean square of 1
_NEWTON_STEPS = 10  # the last ones change nothing that float32 holds
_SHARPNESS = 4.0  # s is the log-odds times this
_HALF_WIDTH = 8.0  # b: the step rises between log-odds of -2 and 2


@dataclass(frozen=True)
class RolePair:
    """What a pair is fitted to; sums over tokens are those of all processes.

    Attributes:
        z: the MLP's input at this process's tokens, [n, d_model].
        weight: what an error at each token counts, [n].
        chosen, held_out: boolean [n], the tokens of the role, and those of texts that choose.
        sizes: weighted squares of the neurons, [d_mlp].
    """

    mlp: GatedMLP
    z: Tensor
    weight: Tensor
    chosen: Tensor
    held_out: Tensor
    sizes: Tensor

    @staticmethod
    def of(models: TeacherStudent, mlp: GatedMLP, scopes: frozenset[Scope]) -> RolePair:
        """Run the student through the block once; `advance` is called twice for each text."""
        tokens, sizes = [], []
        for own in run_student(models, mlp.block, [mlp.gate.name, mlp.down]):
            roles = own.batch.roles[own.batch.roles != PAD].to(own.weight.device)
            tokens.append((own.calls[mlp.gate.name].input, own.weight, in_scope(roles, scopes), own.held_out))
            sizes.append(own.weight @ own.calls[mlp.down].input.square())
        z, weight, chosen, held_out = (torch.cat(parts) for parts in zip(*tokens, strict=True))
        return RolePair(mlp, z, weight, chosen, held_out, _summed(torch.stack(sizes).double().sum(dim=0)))

    def edits(self, models: TeacherStudent, *, to_all: bool) -> tuple[Edits, LowRank]:
        """The edits that make the pair (see `take_neurons`)."""
        weight = self.weight if to_all else self.weight * ~self.held_out
        gram = self._gram(weight)
        constant = self._constant(weight, gram)
        middle, half = _SHARPNESS * self._log_odds(weight, gram), _HALF_WIDTH * constant
        # As large beside the other neurons as a step from 0 to 1 that is large beside them.
        stepped = float(_summed((self.weight * self.chosen).sum()))
        size = (_SIZE * float(self.sizes.mean()) / max(stepped, 1e-30)) ** 0.5
        gates, read = torch.stack([middle + half, middle - half]), size / (2 * _HALF_WIDTH) * constant
        return take_neurons(models, self.mlp, self.sizes, gates, torch.stack([read, read]))

    def _constant(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Least squares of 1, [d_model]: the read that is the same at every token."""
        constant: Tensor = torch.linalg.solve(gram + _PENALTY * _mean_square(gram), _summed(weight @ self.z))
        return constant.float()

    def _log_odds(self, weight: Tensor, gram: Tensor) -> Tensor:
        """Logistic regression of the role, [d_model], by Newton's method."""
        penalty = 2 * _PENALTY * _mean_square(gram)
        solution = torch.zeros_like(penalty[0])
        for _step in range(_NEWTON_STEPS):
            likely = torch.sigmoid(self.z @ solution.float())
            slope = _summed((weight * (likely - self.chosen.float())) @ self.z)
            curvature = self._gram(weight * likely * (1 - likely)) + penalty
            solution = solution - torch.linalg.solve(curvature, slope + penalty @ solution)
        return solution.float()

    def _gram(self, weight: Tensor) -> Tensor:
        """sum w z z^T over the tokens of all processes, [d_model, d_model] in float64."""
        return _summed((self.z * weight.unsqueeze(1)).T @ self.z)


def _summed(value: Tensor) -> Tensor:
    """The sum over all processes, in float64."""
    total = value.double()
    sum_over_all(total)
    return total


def _mean_square(gram: Tensor) -> Tensor:
    """The mean of the diagonal, as a multiple of the identity."""
    return gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
