"""Train one block's low-rank edits so that its output is the steered block's, whatever lies above it.

The regression of `closed_form` is linear in what a writer reads; gate, up, query, key and value are not
reached by it. Here all Linears of one block are trained together on

    sum over tokens of ||h_steered - h_student||^2 / ||h_steered||^2        (h: the block's output)

and nothing outside the block is run: a step costs 1/n_layers of a full one, so a few thousand of
them are affordable where end-to-end training has a few dozen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from compile_steer.common.progress import Advance
from compile_steer.lower.optimise import adamw, held_out_split, set_rate, trainable, worn
from compile_steer.lower.teacher_student import Flow, Walk, run_block
from compile_steer.lower.work import Curve
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.patch import WeightPatch, with_patch


def fit_block(walk: Walk, block: int, *, rank: int, steps: int, rate: float, seed: int, advance: Advance) -> Curve:
    """Put the trained edits of `block` into `walk.solved`, unless they are no better on held-out batches.

    Returns the curve: the loss of every step, and the held-out error before and after.

    Args:
        rank: of every edit; those that are there already are the start, filled up to it.
        steps: of AdamW, a batch of the walk each.
        rate: AdamW's, relative to each factor's root mean square.
    """
    layout = walk.loaded.layout
    start = random_edits(layout, block, rank, seed)
    for name, edit in start.items():
        if name in walk.solved:
            start[name] = _filled(walk.solved[name].to(walk.loaded.device), edit)
    factors = trainable(start, walk.loaded.device)
    edits = worn(factors).low_rank
    others = {name: edit for name, edit in walk.solved.items() if name not in edits}
    patch, before = WeightPatch({**others, **edits}), WeightPatch(dict(walk.solved))
    flows = list(walk.flows)
    random.Random(seed).shuffle(flows)
    held_out, seen = held_out_split(flows)

    optimizer = adamw(factors, rate)
    losses: list[float] = []
    with with_patch(walk.loaded.model, patch), torch.enable_grad():
        for step in range(steps):
            if step % len(seen) == 0:
                random.Random(seed + step).shuffle(seen)
            flow = seen[step % len(seen)]
            optimizer.zero_grad()
            error, size = _error(walk, flow, block)
            (error / size).backward()
            set_rate(optimizer, step, steps)
            optimizer.step()
            losses.append(float((error / size).detach()))
            advance(1)
    errors = [_relative_error(walk, held_out, block, one) for one in (before, patch)]
    if errors[1] < errors[0]:
        walk.solved.update({name: LowRank(B.detach(), A.detach()) for name, (B, A) in factors.items()})
    return {"loss": losses, "held_out_error": errors}


def random_edits(layout: Layout, block: int, rank: int, seed: int) -> dict[str, LowRank]:
    """LoRA's own start for every Linear of a block: A random, B zero, so nothing changes yet."""
    generator = torch.Generator().manual_seed(seed + block)
    edits = {}
    for name, module in layout.linears(block).items():
        d_out, d_in = linear_shape(module)
        A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
        edits[name] = LowRank(torch.zeros(d_out, rank), A)
    return edits


def _filled(edit: LowRank, fresh: LowRank) -> LowRank:
    """`edit` with the random rows of `fresh`, brought to its scale, up to the rank of `fresh`."""
    extra = fresh.rank - edit.rank
    if extra <= 0:
        return edit
    rows = fresh.A[:extra].to(edit.A)
    rows = rows * (edit.A.square().mean() / rows.square().mean()).sqrt()
    return LowRank(torch.cat([edit.B, edit.B.new_zeros(len(edit.B), extra)], dim=1), torch.cat([edit.A, rows]))


def _error(walk: Walk, flow: Flow, block: int) -> tuple[Tensor, Tensor]:
    """(sum of ||error||^2 / ||h||^2, number of tokens) of the student under the patch that is on."""
    found = run_block(walk.loaded, flow.batch, flow.student, block)
    real = flow.real
    wanted = flow.target[real].float()
    # Relative to the stream, as the norms of the blocks above see it.
    error = (found[real].float() - wanted).square().sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-12)
    return error.sum(), real.sum()


def _relative_error(walk: Walk, flows: Sequence[Flow], block: int, patch: WeightPatch) -> float:
    with with_patch(walk.loaded.model, patch), torch.no_grad():
        found = [_error(walk, flow, block) for flow in flows]
    return float(sum(error for error, _n in found) / sum(n for _e, n in found))
