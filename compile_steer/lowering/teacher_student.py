"""The steered model (teacher) and the patched one (student), over the same batches.

Both are the same weights: the teacher runs with the hooks on, the student with the patch on. Below the first block that
either changes they compute the same thing, so that prefix is run once. `TeacherStudent` keeps both side by side at the
boundary of one block after another, for fits of single blocks; `SuffixModel` runs all blocks after the prefix at once,
for training end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compile_steer.common.distributed import count, sum_over_all
from compile_steer.common.progress import Advance
from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import own_divergence
from compile_steer.models.tokens import Batch, Encoded, batches
from compile_steer.steering.hooks import PAD, in_scope, steered
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

_SENSITIVITY_TOKENS = 1024  # about so many
_UNCHANGED_WEIGHT = 0.1  # of a token; at 0.01 a program that edits responses alone finds no edit


def run_batch(
    loaded: LoadedModel, batch: Batch, hidden: Tensor | None = None, *, start: int = 0, stop: int | None = None
) -> Tensor:
    """Run blocks `start` to `stop` - 1 on `hidden`, under the hooks and patches that are on; [batch, time, d_model]."""
    return run_blocks(loaded.model, batch.input_ids, batch.attention_mask, start=start, stop=stop, hidden=hidden)


def _with_prefix(
    loaded: LoadedModel, texts: Sequence[Encoded], max_tokens: int, first: int, *, shared: bool = True
) -> Iterator[tuple[Batch, Tensor | None]]:
    """The texts in batches on the model's device, with the input of block `first` (None for block 0).

    Of each batch a process has its own rows if `shared`, so that batches hold the same texts however many processes there are.
    """
    for whole in batches(loaded, texts, max_tokens=max_tokens):
        batch = whole.own() if shared else whole
        with torch.no_grad():
            hidden = run_batch(loaded, batch, stop=first) if first else None
        yield batch, hidden


def token_weights(batch: Batch, program: Program) -> Tensor:
    """What an error at each token counts, [batch, time]: less where the program changes nothing and no response is predicted.

    There an edit that reads something else has to be told from none, which a linear one cannot do everywhere. Artifacts are
    measured where responses are predicted; what is read before, they see through the attention alone. Where the program
    changes every token all count the same, for all show the same edit.
    """
    changed = in_scope(batch.roles, frozenset(scope for i in program.interventions for scope in i.scopes))
    weights = torch.where(changed | batch.predicts_response, 1.0, _UNCHANGED_WEIGHT)
    return torch.where(batch.roles == PAD, 0.0, weights)


def total_weight(batch: Batch, program: Program) -> float:
    """What errors at all tokens of a batch count together, in all processes."""
    return float(token_weights(batch.whole, program).sum())


@dataclass
class ActivationBatch:
    """A batch at a block's boundary; hidden states are [batch, time, d_model], None before block 0.

    Attributes:
        teacher, student: the input of the current block in either model.
        target: the teacher's output of the current block.
        weights: what an error at each token counts, [batch, time], 0 for padding.
    """

    batch: Batch
    teacher: Tensor | None
    student: Tensor | None
    target: Tensor
    weights: Tensor

    @property
    def real(self) -> Tensor:
        """Boolean [batch, time]: tokens that are not padding."""
        return (self.batch.roles != PAD).to(self.target.device)  # a block may compute on another device than the first

    def select(self, chosen: Tensor) -> ActivationBatch:
        """The texts where `chosen`, boolean [batch], is true."""
        teacher, student = (None if hidden is None else hidden[chosen] for hidden in (self.teacher, self.student))
        return ActivationBatch(self.batch.select(chosen), teacher, student, self.target[chosen], self.weights[chosen])


class TeacherStudent:
    """Both models at the boundary of one block, at first of the one that the program changes first.

    Only two hidden states a token are in memory. The wide activations inside a block are never kept, blocks above the
    last fitted one are not run, and neither is the language-model head.

    Attributes:
        solved: the student's edits so far, by module name.
        kept: parts of them that stay when a projection is solved again.
        dial: whether every edit has to be in proportion to what the program changes, so that the artifact's scale is a dial.
        exact: blocks whose edits leave next to nothing of the change.
        sensitivity: by block, what an error in each dimension of its output counts, [d_model]; none: all the same.
    """

    def __init__(
        self,
        program: Program,
        loaded: LoadedModel,
        texts: Sequence[Encoded],
        max_tokens: int,
        advance: Advance,
        dial: bool = False,
    ) -> None:
        self.program, self.loaded, self.dial = program, loaded, dial
        self.solved: dict[str, LowRank] = {}
        self.kept: dict[str, LowRank] = {}
        self.exact: set[int] = set()
        self.sensitivity: dict[int, Tensor] = {}
        self.batches: list[ActivationBatch] = []
        for batch, hidden in _with_prefix(loaded, texts, max_tokens, program.first_layer):
            # Both models share the hidden state here, so that it is held once.
            weights = token_weights(batch, program)
            self.batches.append(ActivationBatch(batch, hidden, hidden, torch.empty(0), weights))
            advance(len(batch.rows) * count())

    @property
    def patch(self) -> WeightPatch:
        return WeightPatch(dict(self.solved))

    def run_teacher(self, block: int) -> None:
        """Run the teacher through `block`."""
        for activations in self.batches:
            activations.target = self.steered_output(activations, block)

    def steered_output(self, activations: ActivationBatch, block: int, strength: float = 1.0) -> Tensor:
        """The teacher's output of `block`, under the program times `strength`.

        At another strength than 1 only of the first block that the program changes: above it the teacher's input is that of 1.
        """
        program = self.program.scaled(strength)
        with steered(self.loaded.model, program, roles=activations.batch.roles), torch.no_grad():
            return self.run_block(activations.batch, activations.teacher, block)

    def is_dial(self, block: int) -> bool:
        """Whether what the program changes in `block` is in proportion to its strength, and so an edit there should be.

        A constant is added to every token in proportion to its coefficient; behind a norm an edit cannot be, nor one that neurons
        were taken for.
        """
        layout = self.loaded.layout
        normed = any(layout.norm(block, kind) for kind in layout.projection_kinds(block))
        neurons = any(name in self.kept for name in layout.linears(block))
        first = block == self.program.first_layer
        return self.program.adds_constant(block) and not normed and not neurons and first

    def run_student(self, block: int) -> None:
        """Run the patched student through `block`, and move both to the next boundary."""
        with with_patch(self.loaded.model, self.patch), torch.no_grad():
            for activations in self.batches:
                activations.student = self.run_block(activations.batch, activations.student, block)
                activations.teacher = activations.target

    def run_block(self, batch: Batch, hidden: Tensor | None, block: int) -> Tensor:
        """The output of `block`, under the hooks and patches that are on; [batch, time, d_model]."""
        return run_batch(self.loaded, batch, hidden, start=block, stop=block + 1)


def measure_sensitivity(
    program: Program, loaded: LoadedModel, texts: Sequence[Encoded], blocks: Sequence[int], seed: int
) -> dict[int, Tensor]:
    """How much the steered model's final states move with each dimension of the blocks' outputs, [d_model] by block.

    The root of the mean of J_ij^2 over outputs i and tokens, J the Jacobian, relative to its mean square over the
    dimensions: of a sample of random combinations of outputs, one backward pass over some of the texts. The norms in
    front of the blocks above have weights of .02 to 30 in trained models, so dimensions differ by as much.
    """
    if not blocks:
        return {}
    loaded.require_resident("closed_form in a model with norms behind its projections")
    squares = {block: torch.zeros(loaded.layout.d_model, device=loaded.device) for block in blocks}
    sample = texts[:: max(1, sum(len(text.ids) for text in texts) // _SENSITIVITY_TOKENS)]
    generator = torch.Generator().manual_seed(seed)
    # All of it in every process: it is small, and the random signs are drawn for whole batches.
    for batch, hidden in _with_prefix(loaded, sample, _SENSITIVITY_TOKENS // 4, min(blocks), shared=False):
        outputs: dict[int, Tensor] = {}

        def keep(block: int, outputs: dict[int, Tensor], _module: nn.Module, _args: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            outputs[block] = state = state if state.requires_grad else state.detach().requires_grad_()
            return (state, *output[1:]) if isinstance(output, tuple) else state

        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(steered(loaded.model, program, roles=batch.roles))
            for block in blocks:
                hook = partial(keep, block, outputs)
                stack.callback(loaded.layout.blocks[block].register_forward_hook(hook).remove)
            final = run_batch(loaded, batch, hidden, start=min(blocks))
        # Without each text's first token: in many models its norm is a hundred times the others'.
        real = (batch.roles != PAD) & ((batch.roles != PAD).cumsum(dim=1) > 1)
        signs = torch.randn(final.shape, generator=generator).to(final) * real.unsqueeze(2)
        gradients = torch.autograd.grad(final, [outputs[block] for block in blocks], signs)
        for block, gradient in zip(blocks, gradients, strict=True):
            # An error counts relative to ||h||, for the blocks above see the stream normalised.
            relative = gradient[real].float() * outputs[block].detach()[real].float().norm(dim=1, keepdim=True)
            squares[block] += relative.square().sum(dim=0)
    return {
        block: (square / square.mean().clamp(min=1e-30)).sqrt().clamp(min=1e-3) for block, square in squares.items()
    }


@dataclass(frozen=True)
class TeacherBatch:
    """A batch and what the teacher makes of it.

    Attributes:
        prefix: the input of the first block, [batch, time, d_model]; None for block 0.
        teacher: its output, [n_tokens, d_model].
        weights: what an error at each token counts, [n_tokens].
        total_weight: their sum over the tokens of all processes.
    """

    batch: Batch
    prefix: Tensor | None
    teacher: Tensor
    weights: Tensor
    total_weight: float

    def weighted(self, values: Tensor, part: slice = slice(None)) -> Tensor:
        """The weighted sum of a value at each token of `part`, [n]."""
        return (self.weights[part].to(values.device) * values).sum()


@dataclass(frozen=True)
class SuffixModel:
    """Blocks `first` to `stop` - 1 of teacher and student (`stop` None: all, and the final norm).

    Attributes:
        recompute_every: of one block in so many (0: of none) the student keeps the input alone, and computes the rest
            again for the gradient.
        dtype: of the student's matrix products; below float32 they run under autocast, its patch does not.
    """

    loaded: LoadedModel
    program: Program
    first: int
    stop: int | None = None
    recompute_every: int = 0
    dtype: torch.dtype = torch.float32

    def batches(self, texts: Sequence[Encoded], max_tokens: int) -> list[TeacherBatch]:
        """The texts in batches, with the teacher's output."""
        return [self.run_teacher(*batch) for batch in _with_prefix(self.loaded, texts, max_tokens, self.first)]

    def run_teacher(self, batch: Batch, prefix: Tensor | None) -> TeacherBatch:
        """Run the teacher from the input of block `first` on."""
        with torch.no_grad(), steered(self.loaded.model, self.program, roles=batch.roles):
            teacher = run_batch(self.loaded, batch, prefix, start=self.first, stop=self.stop)
        real = batch.roles != PAD
        weights = token_weights(batch, self.program)[real].to(teacher.device)
        return TeacherBatch(batch, prefix, teacher[real], weights, total_weight(batch, self.program))

    def student(self, batch: TeacherBatch) -> Tensor:
        """The student's output for the real tokens, [n_tokens, d_model]; its patch must be on."""
        inner, hidden, start = batch.batch, batch.prefix, self.first
        last = (self.loaded.layout.n_layers if self.stop is None else self.stop) - 1
        with torch.autocast(self.loaded.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if not self.recompute_every:
                output = run_batch(self.loaded, inner, hidden, start=start, stop=self.stop)
            else:
                for block in range(start, last):
                    run = partial(run_batch, self.loaded, inner, start=block, stop=block + 1)
                    recompute = (last - block) % self.recompute_every == 0
                    hidden = checkpoint(run, hidden, use_reentrant=False) if recompute else run(hidden)
                # The last block runs together with the final norm, and is always recomputed.
                run = partial(run_batch, self.loaded, inner, start=last, stop=self.stop)
                output = cast(Tensor, checkpoint(run, hidden, use_reentrant=False))
        return output[inner.roles != PAD]

    def mean_kl(self, batches: Sequence[TeacherBatch], patch: WeightPatch) -> float:
        """Weighted mean of KL(teacher || student) over the real tokens, nats a token; the suffix must reach the end."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            with with_patch(self.loaded.model, patch), torch.no_grad():
                student = self.student(batch)
            kl = own_divergence(self.loaded.model, batch.teacher, self.loaded.model, student).kl
            total += batch.weighted(kl)
        sum_over_all(total)
        return float(total) / sum(batch.total_weight for batch in batches)
