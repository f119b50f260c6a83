"""Passes of the student through one block: what its modules read, what its output lacks, and how much on held-out texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common.distributed import sum_over_all
from compile_steer.lowering.teacher_student import ActivationBatch, TeacherStudent
from compile_steer.models.tokens import Batch
from compile_steer.steering.patch import WeightPatch, with_patch

HELD_OUT_EVERY = 5  # one text in five chooses the ridge


@dataclass(frozen=True)
class Call:
    """What a module read and wrote for the real tokens of a batch, [n, d_in] and [n, d_out] in float32."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class StudentTokens:
    """The real tokens of one batch behind a block of the student.

    Attributes:
        calls: by name, of the modules that were asked for.
        missing: what the block's output lacks of the steered model's, [n, d_model], by its sensitivity.
        weight: what a squared error of it counts, [n].
        held_out: boolean [n], the tokens of texts that choose.
    """

    batch: Batch
    calls: dict[str, Call]
    missing: Tensor
    weight: Tensor
    held_out: Tensor


def batch_with_texts(models: TeacherStudent) -> ActivationBatch:
    """A batch of which this process has texts: of several, one may have none of the first."""
    return next(activations for activations in models.batches if activations.batch.rows)


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of the modules' last call inside the block, in the order of the calls; their patch's share is in them."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls.pop(name, None)
        calls[name] = args[0], output

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(record, name)).remove)
        yield calls


def run_student(models: TeacherStudent, block: int, names: Sequence[str]) -> Iterator[StudentTokens]:
    """Run the student through a block, one batch after the other."""
    model = models.loaded.layout.model
    for activations in models.batches:
        batch, real = activations.batch, activations.real
        # The hooks that record come after the patch's, so that what they see holds the patch's share.
        with with_patch(models.loaded.model, models.patch), recorded(model, names) as calls, torch.no_grad():
            student = models.run_block(batch, activations.student, block)
        own = {name: Call(*(real_tokens(value, real) for value in call)) for name, call in calls.items()}
        missing = (activations.target - student)[real].float()
        if block in models.sensitivity:
            missing *= models.sensitivity[block]
        yield StudentTokens(batch, own, missing, error_weights(activations, student), held_out_tokens(activations))


def real_tokens(values: Tensor, real: Tensor) -> Tensor:
    """What a module read or wrote for the real tokens of a batch, [n, d] in float32."""
    # Some models hand their MLP all tokens in one row.
    return values.view(*real.shape, -1)[real].float()


def products(models: TeacherStudent, block: int, names: Sequence[str], B: Tensor) -> dict[str, Tensor]:
    """W B of each module, [d_out, r] in float32, for B [d_in, r]: by its own code, whatever its weights are stored as."""
    results: dict[str, Tensor] = {}

    def multiply(name: str, module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        rows = B.T.to(args[0])
        results[name] = (module.forward(rows) - module.forward(torch.zeros_like(rows))).float().T.contiguous()

    activations = models.batches[0]
    # While the block runs, for there alone its weights are sure to be whole, and on this device.
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            module = models.loaded.layout.model.get_submodule(name)
            stack.callback(module.register_forward_hook(partial(multiply, name)).remove)
        models.run_block(activations.batch, activations.student, block)
    return results


def error_weights(activations: ActivationBatch, output: Tensor) -> Tensor:
    """What a squared error of a block's output [batch, time, d_model] counts at the real tokens, [n].

    Relative to ||h||^2, for the blocks above see the stream normalised; the first token, whose norm is a hundred times that of the
    others, would otherwise rule the sums.
    """
    real = activations.real
    return activations.weights.to(real.device)[real] / output[real].float().square().sum(dim=1).clamp(min=1e-12)


def held_out_tokens(activations: ActivationBatch) -> Tensor:
    """Boolean [n]: the real tokens of texts that choose."""
    real = activations.real
    return is_held_out(activations.batch).to(real.device).unsqueeze(1).expand_as(real)[real]


def is_held_out(batch: Batch) -> Tensor:
    """Boolean [batch]: the texts that choose."""
    return torch.tensor(batch.rows, device=batch.input_ids.device) % HELD_OUT_EVERY == 0


def held_out_error(models: TeacherStudent, block: int, patch: WeightPatch) -> float:
    """Weighted sum of ||S (h_steered - h_student)||^2 / ||h_steered||^2 over the held-out texts, under `patch`, S the
    sensitivity."""
    total = torch.zeros((), dtype=torch.float64, device=models.loaded.device)
    with with_patch(models.loaded.model, patch), torch.no_grad():
        for activations in models.batches:
            held_out = activations.select(is_held_out(activations.batch))
            if held_out.batch.rows:
                student = models.run_block(held_out.batch, held_out.student, block)[held_out.real].float()
                target = held_out.target[held_out.real].float()
                missing = (target - student) * models.sensitivity.get(block, 1.0)
                error = missing.square().sum(dim=1) / target.square().sum(dim=1).clamp(min=1e-12)
                total += (held_out.weights.to(error.device)[held_out.real] * error).sum()
    sum_over_all(total)
    return float(total)
