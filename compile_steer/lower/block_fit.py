"""Train one block's low-rank edits so that its output is the steered block's, whatever lies above it.

The regression of `closed_form` is linear in what a writer reads; gate, up, query, key and value are not
reached by it. Here all Linears of one block are trained together on

    sum over tokens of ||h_steered - h_student||^2 / ||h_student||^2        (h: the block's output)

and nothing outside the block is run: a step costs 1/n_layers of a full one, so a few thousand of
them are affordable where end-to-end training has a few dozen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from compile_steer.layout import Layout
from compile_steer.lower.walk import Flow, Walk, run_block
from compile_steer.patch import LowRank, WeightPatch, applied, linear_shape
from compile_steer.progress import Tick

T = TypeVar("T")
Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]

BETAS = (0.9, 0.99)
_HELD_OUT_EVERY = 6


def fit_block(walk: Walk, block: int, *, rank: int, steps: int, rate: float, seed: int, tick: Tick) -> None:
    """Put the trained edits of `block` into `walk.solved`, unless they are no better on held-out batches.

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
    edits = {name: LowRank(B, A) for name, (B, A) in factors.items()}
    others = {name: edit for name, edit in walk.solved.items() if name not in edits}
    patch, before = WeightPatch({**others, **edits}), WeightPatch(dict(walk.solved))
    flows = list(walk.flows)
    random.Random(seed).shuffle(flows)
    held_out, seen = held_out_split(flows)

    optimizer, schedule = optimizer_of(factors, rate, steps)
    with applied(walk.loaded.model, patch), torch.enable_grad():
        for step in range(steps):
            if step % len(seen) == 0:
                random.Random(seed + step).shuffle(seen)
            flow = seen[step % len(seen)]
            optimizer.zero_grad()
            error, size = _error(walk, flow, block)
            (error / size).backward()
            optimizer.step()
            schedule.step()
            tick(1)
    if _relative_error(walk, held_out, block, patch) < _relative_error(walk, held_out, block, before):
        walk.solved.update({name: LowRank(B.detach(), A.detach()) for name, (B, A) in factors.items()})


def held_out_split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """(held out, seen): a sixth is held out; a single item is both."""
    return list(items[::_HELD_OUT_EVERY]), [one for n, one in enumerate(items) if n % _HELD_OUT_EVERY] or list(items)


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


def trainable(edits: Mapping[str, LowRank], device: torch.device) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Copies of the edits' factors (B, A) that AdamW can train."""
    return {
        name: (nn.Parameter(edit.B.float().to(device).clone()), nn.Parameter(edit.A.float().to(device).clone()))
        for name, edit in edits.items()
    }


def optimizer_of(
    factors: Factors, rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with its schedule.

    AdamW's step has the size of the rate whatever the gradient's, so the rate is taken relative to each
    factor's own root mean square (its partner's, for a factor that starts at zero).
    """
    groups: list[dict[str, object]] = []
    for B, A in factors.values():
        sizes = [float(factor.detach().square().mean().sqrt()) for factor in (B, A)]
        for factor, size, other in zip((B, A), sizes, reversed(sizes), strict=True):
            groups.append({"params": [factor], "lr": rate * (size or other)})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS)
    return optimizer, schedule_of(optimizer, steps)


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over a tenth of the steps and cosine decay to zero."""
    warm = max(1, steps // 10)

    def shape(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def _error(walk: Walk, flow: Flow, block: int) -> tuple[Tensor, Tensor]:
    """(sum of ||error||^2 / ||h||^2, number of tokens) of the student under the patch that is on."""
    found = run_block(walk.loaded, flow.batch, flow.student, block)
    real = flow.real
    wanted = flow.target[real].float()
    # Relative to the stream, as the norms of the blocks above see it.
    error = (found[real].float() - wanted).square().sum(dim=1) / wanted.square().sum(dim=1).clamp(min=1e-12)
    return error.sum(), real.sum()


def _relative_error(walk: Walk, flows: Sequence[Flow], block: int, patch: WeightPatch) -> float:
    with applied(walk.loaded.model, patch), torch.no_grad():
        found = [_error(walk, flow, block) for flow in flows]
    return float(sum(error for error, _n in found) / sum(n for _e, n in found))
