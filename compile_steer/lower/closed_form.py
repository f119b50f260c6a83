"""`closed_form`: a low-rank patch solved by regression, with no gradients.

Stage by stage, for a writer W (d_in -> d_model) of a block k at or after the first intervened one, with
x its input in the student (base plus what has been patched so far) and y = h_steered - h_student at the
block's output:

    min over dW of  E_w || y - dW x ||^2 + lambda * mean(diag G) * ||dW||^2,      rank(dW) <= r

by reduced-rank ridge regression (Izenman 1975): G = sum w x x^T and C = sum w x y^T are accumulated in
a stream, dW = C^T (G + lambda I)^-1, and the rank is cut in the metric of G. Memory: d_in^2 + d_in *
d_model for the sums, and two hidden states a calibration token at the boundary of the current block;
the wide activations inside a block are never kept. Each token passes each block once as the steered
model and once per stage as the student, and no block above the last stage is run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.behaviour import Batch, Encoded, batches
from compile_steer.hooks import steered
from compile_steer.layout import Layout, Writer, WriterKind
from compile_steer.models import Loaded
from compile_steer.patch import LowRank, WeightPatch, applied
from compile_steer.program import Program
from compile_steer.replay import run_span

_RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Stage:
    """One regression: the writer of block `first intervened + offset`, cut to `rank`."""

    offset: int
    writer: WriterKind
    rank: int


@dataclass
class _Flow:
    """Calibration tokens at the boundary of the current block: the steered model's and the student's."""

    batch: Batch
    teacher: Tensor
    student: Tensor


@dataclass
class _Sums:
    """Sufficient statistics of one weighted regression, in float64."""

    G: Tensor
    C: Tensor
    yy: Tensor

    @staticmethod
    def zeros(d_in: int, d_out: int, device: torch.device) -> _Sums:
        options = {"dtype": torch.float64, "device": device}
        return _Sums(torch.zeros(d_in, d_in, **options), torch.zeros(d_in, d_out, **options), torch.zeros((), **options))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add tokens x [n, d_in], y [n, d_out] with weights [n]."""
        weighted = x * weight.unsqueeze(1)
        self.G += weighted.T @ x
        self.C += weighted.T @ y
        self.yy += (weight * y.square().sum(dim=1)).sum()

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.G + other.G, self.C + other.C, self.yy + other.yy)

    def error(self, edit: LowRank) -> float:
        """Sum w ||y - B A x||^2 over these tokens, from the sums alone."""
        B, A = edit.B.double(), edit.A.double()
        cross = (A @ self.C * B.T).sum()
        return float(self.yy - 2 * cross + ((A @ self.G @ A.T) * (B.T @ B)).sum())


def solve(sums: _Sums, rank: int, ridge: float) -> LowRank:
    """The reduced-rank ridge solution B [d_out, r], A [r, d_in] in float64."""
    d_in = sums.G.shape[0]
    damped = sums.G + ridge * sums.G.diagonal().mean() * torch.eye(d_in, dtype=sums.G.dtype, device=sums.G.device)
    full = torch.cholesky_solve(sums.C, torch.linalg.cholesky(damped)).T
    # dW G dW^T = U S U^T: projecting on its top eigenvectors loses least of the fitted output.
    _values, vectors = torch.linalg.eigh(full @ damped @ full.T)
    basis = vectors[:, -rank:].flip(1)
    return LowRank(basis, basis.T @ full)


def lower(
    program: Program,
    loaded: Loaded,
    texts: Sequence[Encoded],
    stages: Sequence[Stage],
    *,
    tick: Callable[[int], None] = lambda _n: None,
) -> WeightPatch:
    """Return the patch after which the plain model imitates `program` on `texts`."""
    layout = loaded.layout
    first = program.first_layer
    low_rank: dict[str, LowRank] = {}
    flows = _prefix(loaded, texts, first, tick)
    last = max(stage.offset for stage in stages)
    for offset in range(last + 1):
        block = first + offset
        if block >= layout.n_layers:
            break
        targets = [_advance(loaded, flow, block, program) for flow in flows]
        for stage in (s for s in stages if s.offset == offset):
            writer = layout.writer(block, stage.writer)
            low_rank[writer.name] = _stage(loaded, flows, targets, writer, stage.rank, WeightPatch(dict(low_rank)))
        if offset < last:
            with applied(loaded.model, WeightPatch(low_rank)):
                for flow, target in zip(flows, targets, strict=True):
                    flow.student = _block(loaded, flow.batch, flow.student, block)
                    flow.teacher = target
    return WeightPatch(low_rank)


def _prefix(loaded: Loaded, texts: Sequence[Encoded], first: int, tick: Callable[[int], None]) -> list[_Flow]:
    flows = []
    for batch in batches(texts, int(loaded.tokenizer.pad_token_id)):
        batch = batch.to(loaded.device)
        with torch.no_grad():
            hidden = run_span(loaded.model, batch.input_ids, batch.attention_mask, stop=first)
        flows.append(_Flow(batch, hidden, hidden))
        tick(batch.n_tokens)
    return flows


def _block(loaded: Loaded, batch: Batch, hidden: Tensor, block: int) -> Tensor:
    with torch.no_grad():
        return run_span(loaded.model, batch.input_ids, batch.attention_mask, start=block, stop=block + 1, hidden=hidden)


def _advance(loaded: Loaded, flow: _Flow, block: int, program: Program) -> Tensor:
    with steered(loaded.model, program, roles=flow.batch.roles):
        return _block(loaded, flow.batch, flow.teacher, block)


def _stage(
    loaded: Loaded, flows: Sequence[_Flow], targets: Sequence[Tensor], writer: Writer, rank: int, patch: WeightPatch
) -> LowRank:
    d_in = int(loaded.model.get_submodule(writer.name).weight.numel() // loaded.layout.d_model)
    sums = [_Sums.zeros(d_in, loaded.layout.d_model, loaded.device) for _ in range(2)]
    with applied(loaded.model, patch):
        for n, (flow, target) in enumerate(zip(flows, targets, strict=True)):
            with _caught_input(writer.module) as caught:
                student = _block(loaded, flow.batch, flow.student, writer.layer)
            real = flow.batch.attention_mask.bool()
            x, y = caught[0][real].double(), (target - student)[real].double()
            weight = WEIGHT(student[real].double())
            held = torch.arange(x.shape[0]) // 64 % _HELD_OUT_EVERY == n % _HELD_OUT_EVERY
            sums[0].add(x[~held], y[~held], weight[~held])
            sums[1].add(x[held], y[held], weight[held])
    fit, held_out = sums
    errors = {ridge: held_out.error(solve(fit, rank, ridge)) for ridge in _RIDGES}
    best = min(errors, key=lambda r: errors[r])
    print(writer.name, rank, {r: round(e / float(held_out.yy), 5) for r, e in errors.items()}, best)
    edit = solve(fit + held_out, rank, best)
    return LowRank(edit.B.float(), edit.A.float())

WEIGHT = lambda h: 1 / h.square().sum(1)

@contextmanager
def _caught_input(module: nn.Module) -> Iterator[list[Tensor]]:
    caught: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()
