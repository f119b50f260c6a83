"""`closed_form`: a low-rank patch solved by regression, with no gradients.

Stage by stage, for a writer W (d_in -> d_model) of a block k at or after the first intervened one, with
x its input in the student (base plus what has been patched so far) and y = h_steered - h_student at the
block's output, dW is the reduced-rank ridge solution of y ~ dW x over calibration tokens. Each stage
corrects what the stages before it left over. For a constant shift at every position the target of the
first stage is one vector, so its solution has rank 1 whatever rank is asked for.

Under several processes each holds a share of the texts; the sums alone are exchanged, once a stage.

Memory: d_in^2 + d_in * d_model for the sums, and what the walk over the blocks keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compile_steer.common import distributed
from compile_steer.common.errors import CannotLower
from compile_steer.common.progress import Advance
from compile_steer.lower.job import Job
from compile_steer.lower.regression import Sums, fit
from compile_steer.lower.teacher_student import Walk, run_block
from compile_steer.lower.work import NOWHERE, Work
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded
from compile_steer.steering.layout import EXPERTS, Layout, OutputProjection, ProjectionKind
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

_HELD_OUT_EVERY = 5
_CORRECTION_RANK = 8
_CORRECTION_BLOCKS = 3

Refine = Callable[[Walk, int], None]


@dataclass(frozen=True)
class Stage:
    """One regression: a writer of block `layer`, cut to `rank`."""

    layer: int
    writer: ProjectionKind
    rank: int


def lower(job: Job) -> WeightPatch:
    """Return the patch after which the plain model imitates the program on calibration texts."""
    stages = plan_stages(job)
    with job.progress.phase("closed form: regression", len(job.regression_texts) * (1 + len(stages))) as advance:
        return solve_stages(job.program, job.loaded, job.regression_texts, stages, advance, work=job.work).patch


def plan_stages(job: Job) -> list[Stage]:
    """The recipe's stages, or by default those of each intervened block, then those of the next few.

    In an intervened block the MLP's writer comes first and makes the change; the attention's corrects a small rest, which
    the block's own nonlinearity hardly sees (the other way round the MLP would answer to the whole change); then the first
    is solved anew beside it. A change of what the attention writes is made there, and the MLP's writer mends its answer.
    """
    program, layout = job.program, job.loaded.layout
    if job.options.closed_form.stages is not None:
        return [Stage(program.first_layer + s.offset, s.writer, s.rank) for s in job.options.closed_form.stages]
    intervened = {one.site.changes_from for one in program.interventions}
    later = {block + n for block in intervened for n in range(1, _CORRECTION_BLOCKS + 1)} - intervened
    found = []
    for block in sorted({*intervened, *later}):
        here = [one for one in program.interventions if one.site.changes_from == block]
        constant = bool(here) and all(one.operation == "add" and "all" in one.scopes for one in here)
        rank = 1 if constant else _CORRECTION_RANK
        order: list[tuple[ProjectionKind, int]] = [("attn", _CORRECTION_RANK), ("mlp", _CORRECTION_RANK)]
        if any(one.site.point == "attn_out" for one in here):
            order = [("attn", rank), ("mlp", _CORRECTION_RANK)]
        elif here:
            order = [("mlp", rank), ("attn", rank), ("mlp", _CORRECTION_RANK)]
        if block < layout.n_layers:
            found += [Stage(block, writer, r) for writer, r in order if writer in layout.projection_kinds]
    return found


def solve_stages(
    program: Program,
    loaded: LoadedModel,
    texts: Sequence[Encoded],
    stages: Sequence[Stage],
    advance: Advance,
    *,
    refine: Refine | None = None,
    max_tokens: int = 4096,
    work: Work = NOWHERE,
    name: str = "closed_form",
) -> Walk:
    """One pass over the blocks from the first intervened one to the last stage's, solving as it goes.

    Args:
        stages: in any order of blocks; within a block they are solved as they stand, and a writer that stands there
            again is solved anew.
        refine: called after the regressions of each block; what it puts into `walk.solved` counts.
        work: where, under `name`, what is solved is kept after each block, and found again.
    """
    _require_stages(stages, loaded.layout)
    walk = Walk.start(program, loaded, texts, max_tokens, advance)
    last = max(stage.layer for stage in stages)
    kept = walk.restore(work, name)
    for block in range(program.first_layer, last + 1):
        walk.aim(block)
        if block >= kept:
            for stage in (stage for stage in stages if stage.layer == block):
                writer = loaded.layout.output_projection(block, stage.writer)
                walk.solved.pop(writer.name, None)
                walk.solved[writer.name] = _solve_stage(walk, writer, stage.rank, advance)
            if refine is not None:
                refine(walk, block)
            walk.keep(work, name, block + 1)
        if block < last:
            walk.advance(block)
    return walk


def _require_stages(stages: Sequence[Stage], layout: Layout) -> None:
    n_layers = layout.n_layers
    problems = [
        f"stage {s.writer} of block {s.layer}: the model has blocks 0 to {n_layers - 1}."
        for s in stages
        if s.layer >= n_layers
    ]
    problems += [
        f"stage mlp of block {s.layer}: the MLP is {EXPERTS}."
        for s in stages
        if s.writer not in layout.projection_kinds
    ]
    problems += [
        f"stage {s.writer} of block {s.layer}: rank {s.rank} is above what its matrix can have."
        for s in stages
        if s.layer < n_layers
        and s.writer in layout.projection_kinds
        and s.rank > min(linear_shape(layout.output_projection(s.layer, s.writer).module))
    ]
    if problems:
        raise CannotLower(["compile.closed_form.stages:", *problems])


def _solve_stage(walk: Walk, writer: OutputProjection, rank: int, advance: Advance) -> LowRank:
    loaded = walk.loaded
    _d_model, d_in = linear_shape(writer.module)
    channel = _Channel(loaded.layout, writer)
    sums = [Sums.zeros(d_in, loaded.layout.d_model, loaded.device) for _ in range(2)]
    with with_patch(loaded.model, walk.patch), torch.no_grad():
        for flow in walk.flows:
            with _caught(writer.module) as caught:
                student = run_block(loaded, flow.batch, flow.student, writer.layer)
            real = flow.real
            x, written = caught[0][0][real].float(), caught[0][1][real].float()
            y, weight = channel.pull_back((flow.target - student)[real].float(), written, student[real].float())
            rows = torch.tensor(flow.batch.rows, device=real.device).unsqueeze(1).expand_as(real)[real]
            held = (
                rows * distributed.count() + distributed.rank()
            ) % _HELD_OUT_EVERY == 0  # the same texts, however they are shared
            for part, chosen in zip(sums, (~held, held), strict=True):
                part.add(x[chosen], y[chosen], weight[chosen])
            advance(len(flow.batch.rows))
    train, held_out = (part.over_all_processes() for part in sums)
    edit = channel.push_forward(fit(train, held_out, rank))
    return LowRank(edit.B.float(), edit.A.float())


class _Channel:
    """How a writer's output enters the residual stream, linearised: h += g_t * (D z), z the output.

    Pre-norm families: g = the residual multiplier, D = 1. Post-norm families: an RMS norm, g_t = 1/rms(z_t)
    and D = its weights. The regression is done on D^-1-free coordinates with token weights that carry g_t,
    so that the error that is minimised is the one in the stream.
    """

    def __init__(self, layout: Layout, writer: OutputProjection) -> None:
        self._multiplier = layout.residual_multiplier
        norm_name = layout.family.attn_norm if writer.kind == "attn" else layout.family.mlp_norm
        self._gain: Tensor | None = None
        if norm_name is not None:
            norm = layout.blocks[writer.layer].get_submodule(norm_name)
            ones = torch.ones(layout.d_model, device=layout.model.device, dtype=layout.model.dtype)
            with torch.no_grad():
                # The RMS of ones is 1, so the norm's output is its weights, however the family stores them.
                self._gain = norm(ones).float()

    def pull_back(self, y: Tensor, written: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and weights [n] for the regression, from the wanted change of the stream y [n, d_model].

        Weight 1/||h||^2: the blocks above see the stream normalised, so an error counts relative to it; the
        first token, whose norm is a hundred times the others', would otherwise rule the sums.
        """
        weight = 1.0 / stream.square().sum(dim=1).clamp(min=1e-12)
        if self._gain is None:
            return y / self._multiplier, weight
        rms = written.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        return y * rms, weight / rms.squeeze(1).square()

    def push_forward(self, edit: LowRank) -> LowRank:
        """The edit of the writer itself."""
        if self._gain is None:
            return edit
        safe = torch.where(self._gain.abs() < 1e-3, torch.inf, self._gain)
        return LowRank(edit.B / safe.double().unsqueeze(1), edit.A)


@contextmanager
def _caught(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of `module` in the next pass, the patch's share of the output included."""
    caught: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        caught.append((args[0], output))

    handle = module.register_forward_hook(hook)
    try:
        yield caught
    finally:
        handle.remove()
