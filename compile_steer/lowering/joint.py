"""Both output projections of a block at once, and what its MLP then has to be kept from.

A constant that every token gets is read best from what the attention hands to its projection: each head's weights over the
tokens sum to 1, so that what is the same in all values comes out the same at any length of the context, and the noise of
single tokens is averaged. But the MLP of the same block reads what the attention writes, and would answer to the change. So

1. one regression finds the edits of both projections together, as if the MLP read what it did before;
2. a second one finds the edit of the matrices that read the MLP's input (gate and up) that makes this so: the change
   that is to be taken away lies in their input, where it is easy to tell.

Where the second fails, the two projections one after the other leave less: the MLP's first, so that the block's own nonlinearity
hardly sees the attention's. So both ways are tried.

Before both, neurons of the MLP are tried, which compute what no linear read does: a constant by itself (see `constant_neuron`), or a
pair that reads the stream or the token's role, with the two projections one after the other (see `stream_pair`, `role_pair`). Three
matrices change together there, so the artifact's scale is no dial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch

from compile_steer.common.distributed import count
from compile_steer.common.progress import Advance
from compile_steer.lowering.block_pass import (
    batch_with_texts,
    error_weights,
    held_out_error,
    held_out_tokens,
    products,
    real_tokens,
    recorded,
    run_student,
)
from compile_steer.lowering.constant_neuron import ConstantNeuron
from compile_steer.lowering.neurons import Edits, GatedMLP
from compile_steer.lowering.projection import solve_projection
from compile_steer.lowering.regression import RidgeFitter
from compile_steer.lowering.role_pair import RolePair
from compile_steer.lowering.stream_pair import StreamPair
from compile_steer.lowering.teacher_student import TeacherStudent
from compile_steer.steering.layout import Layout, OutputProjection
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.measure import KINDS
from compile_steer.steering.patch import with_patch

_ATTENTION = 3.0  # the size of the attention's inputs beside the MLP's: a ridge takes less from what is larger
_READERS_RANK = 8
_ENOUGH = 0.001  # of the error without an edit: where neurons leave less, nothing else is tried


class _Way(Protocol):
    """Gives the student edits of a block, fitted to all texts or without those that choose."""

    def __call__(self, *, to_all: bool) -> None: ...


def has_both(layout: Layout, block: int) -> bool:
    """Whether attention and MLP of a block each write the stream by one matrix, the MLP last and no norm behind either."""
    if set(layout.projection_kinds(block)) != set(KINDS) or not layout.sublayer(block, "mlp").last:
        return False
    return all(layout.sublayer(block, kind).alone and layout.norm(block, kind) is None for kind in KINDS)


def solve_jointly(models: TeacherStudent, block: int, rank: int, advance: Advance, note: Callable[[str], None]) -> None:
    """Give the student the edits of both output projections of a block and of what its MLP reads by, in the place of earlier ones.

    Of several ways (see above) the one that leaves the smallest error of the block's output on texts that none was fitted to.

    Args:
        rank: of what both projections write together.
        advance: called with four times the number of texts in all.
        note: told of an edit that is not used.
    """
    attn, mlp = (models.loaded.layout.output_projection(block, kind) for kind in KINDS)
    for name in models.loaded.layout.linears(block):
        models.solved.pop(name, None)
    ways = _Ways(models, attn, mlp, rank, note, dict(models.solved))
    neurons = _neurons(models, attn, mlp)
    tried: list[_Way] = [ways.together, ways.one_by_one]
    if isinstance(neurons, ConstantNeuron):
        tried.insert(0, partial(ways.with_constant, neurons))
    elif neurons:
        tried[:0] = [partial(ways.with_pair, pair) for pair in neurons.variants]
    n_texts = count() * sum(len(activations.batch.rows) for activations in models.batches)
    enough = _ENOUGH * held_out_error(models, block, models.patch) if neurons else 0.0
    errors: list[float] = []
    for way in tried:
        way(to_all=False)
        errors.append(held_out_error(models, block, models.patch))
        advance(3 * n_texts / len(tried))
        if errors[0] < enough:
            models.exact.add(block)
            break
    tried[errors.index(min(errors))](to_all=True)
    advance((4 - 3 * len(errors) / len(tried)) * n_texts)


def _neurons(
    models: TeacherStudent, attn: OutputProjection, mlp: OutputProjection
) -> ConstantNeuron | StreamPair | RolePair | None:
    """The neurons that a change in the block asks for; None where the artifact's scale is to be a dial or the MLP has no gate."""
    program, block = models.program, attn.layer
    gated = None if models.dial or not program.at_block(block) else GatedMLP.of(models, block, mlp.name)
    if gated is None:
        return None
    if program.reads_stream(block):
        return StreamPair.of(models, gated)
    if program.adds_constant(block):
        return ConstantNeuron.of(models, gated)
    scopes = program.adds_to(block)
    return RolePair.of(models, gated, attn, scopes) if scopes else None


@dataclass(frozen=True)
class _Ways:
    """The ways to solve a block, each of which replaces the student's edits there.

    Attributes:
        earlier: the student's edits of other blocks.
    """

    models: TeacherStudent
    attn: OutputProjection
    mlp: OutputProjection
    rank: int
    note: Callable[[str], None]
    earlier: Edits

    @cached_property
    def _both(self) -> _Both:
        self._give({}, {})
        return _Both.of(self.models, self.attn, self.mlp)

    def together(self, *, to_all: bool) -> None:
        """Both projections together, then what its MLP reads by."""
        models, found = self.models, self._both.fit(self.rank, to_all)
        self._give(found, {})
        self._give(
            {**found, **_fit_readers(models, self.attn.layer, _readers(models, self.attn, self.mlp), to_all)}, {}
        )

    def one_by_one(self, *, to_all: bool) -> None:
        """The MLP's projection, then the attention's."""
        self._give(self._both.fit_mlp(self.rank, to_all), {})
        self._solve(self.attn, to_all)

    def with_constant(self, neuron: ConstantNeuron, *, to_all: bool) -> None:
        """A neuron that writes the constant, and nothing else."""
        edits, column = neuron.edits(self.models, to_all=to_all)
        self._give({**edits, self.mlp.name: column}, {})
        column = LowRank(column.B + neuron.column(self.models, column.A, to_all=to_all), column.A)
        self._give({**edits, self.mlp.name: column}, {self.mlp.name: column})

    def with_pair(self, pair: StreamPair | RolePair, *, to_all: bool) -> None:
        """A pair of neurons that reads what the projections do not, then the two one after the other."""
        self._give({}, {})
        self._give(*pair.edits(self.models, to_all=to_all))
        for projection in (self.mlp, self.attn):
            self._solve(projection, to_all)

    def _give(self, edits: Edits, kept: Edits) -> None:
        self.models.solved, self.models.kept = {**self.earlier, **edits}, kept

    def _solve(self, projection: OutputProjection, to_all: bool) -> None:
        solve_projection(self.models, projection, self.rank, lambda _texts: None, self.note, to_all=to_all)


def _readers(models: TeacherStudent, attn: OutputProjection, mlp: OutputProjection) -> list[str]:
    """The matrices that read the MLP's input: those that are run between the two projections on the first one's input."""
    layout, activations = models.loaded.layout, batch_with_texts(models)
    with recorded(layout.model, list(layout.linears(attn.layer))) as calls, torch.no_grad():
        models.run_block(activations.batch, activations.student, attn.layer)
    order = list(calls)
    between = order[order.index(attn.name) + 1 : order.index(mlp.name)]  # none where the MLP is run first
    inputs = {name: calls[name][0] for name in between}
    return [name for name in between if inputs[name].data_ptr() == inputs[between[0]].data_ptr()]


@dataclass(frozen=True)
class _Both:
    """The regression of what a block's output lacks on what both projections read.

    Attributes:
        fitter: its inputs are the attention's, times `factor`, and then the MLP's.
    """

    attn: OutputProjection
    mlp: OutputProjection
    fitter: RidgeFitter
    factor: float

    @staticmethod
    def of(models: TeacherStudent, attn: OutputProjection, mlp: OutputProjection) -> _Both:
        """Run the student through the block and add up its tokens."""
        layout = models.loaded.layout
        (_, d_attn), (_, d_mlp) = (linear_shape(projection.module) for projection in (attn, mlp))
        fitter = RidgeFitter(d_attn + d_mlp, layout.d_model, layout.device_of(attn.layer))
        for tokens in run_student(models, attn.layer, [attn.name, mlp.name]):
            # What a projection writes reaches the stream times its multiplier.
            inputs = [layout.sublayer(p.layer, p.kind).multiplier * tokens.calls[p.name].input for p in (attn, mlp)]
            fitter.update(torch.cat(inputs, dim=1), tokens.missing, tokens.weight, tokens.held_out)
        fitter.exchange()
        return _Both(attn, mlp, fitter, fitter.resize(slice(d_attn), slice(d_attn, None), _ATTENTION))

    def fit(self, rank: int, to_all: bool) -> Edits:
        """The edits of both that together write what is missing."""
        edit, _penalty, _helps = self.fitter.fit(rank, to_all=to_all)
        d_attn = linear_shape(self.attn.module)[1]
        parts = {self.attn.name: self.factor * edit.A[:, :d_attn], self.mlp.name: edit.A[:, d_attn:]}
        return {name: LowRank(edit.B.float(), part.float().contiguous()) for name, part in parts.items()}

    def fit_mlp(self, rank: int, to_all: bool) -> Edits:
        """The edit of the MLP's that writes it alone."""
        part = slice(linear_shape(self.attn.module)[1], None)
        edit, _penalty, _helps = self.fitter.part(part).fit(rank, to_all=to_all)
        return {self.mlp.name: LowRank(edit.B.float(), edit.A.float())}


def _fit_readers(models: TeacherStudent, block: int, readers: Sequence[str], to_all: bool) -> Edits:
    """Edits W P of the matrices W that read the MLP's input z, with z + P z as near as may be to the steered model's z.

    P is found once for all of them. Where the program's strength is a factor of what it adds, at strengths of 1 and -1: an
    edit that reads the change itself would be of second order in it, and the artifact's scale no dial.
    """
    if not readers:
        return {}
    layout = models.loaded.layout
    _d_out, d_in = linear_shape(layout.model.get_submodule(readers[0]))
    fitter = RidgeFitter(d_in, d_in, layout.device_of(block))
    for activations in models.batches:
        for strength in (1.0, -1.0) if models.is_dial(block) else (1.0,):
            with recorded(layout.model, readers[:1]) as calls:
                models.steered_output(activations, block, strength)
                wanted, _ = calls[readers[0]]
                with with_patch(models.loaded.model, strength * models.patch), torch.no_grad():
                    output = models.run_block(activations.batch, activations.student, block)
                found, _ = calls[readers[0]]
            z, target = (real_tokens(value, activations.real) for value in (found, wanted))
            weight, held_out = error_weights(activations, output), held_out_tokens(activations)
            fitter.update(z, (target - z) / strength, weight, held_out)
    fitter.exchange()
    if float(fitter.train.yy + fitter.held_out.yy) == 0.0:
        return {}  # the MLP stands beside the attention and reads nothing of it
    edit, _penalty, _helps = fitter.fit(min(_READERS_RANK, d_in), to_all=to_all)
    return {name: LowRank(B, edit.A.float()) for name, B in products(models, block, readers, edit.B.float()).items()}
