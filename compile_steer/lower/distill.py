"""`distill`: a low-rank patch trained on the divergence from the steered model.

Teacher and student are the same weights: the teacher runs with the hooks on, the student with the
patch on. Below the first intervened block they compute the same thing, so that prefix is run once a
text and kept, and so is the teacher's final hidden state; what is repeated every epoch is the student's
suffix. The loss is the forward KL on full logits. Its gradient with respect to the student's final
hidden state is accumulated over chunks of tokens, so that one chunk of logits of each model is all that
ever exists of batch x length x vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compile_steer.behaviour import Batch, Encoded, batches
from compile_steer.hooks import steered
from compile_steer.metrics import chunks, log_softmax
from compile_steer.models import Loaded
from compile_steer.patch import LowRank, WeightPatch, applied
from compile_steer.program import Program
from compile_steer.replay import readout, run_span


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: AdamW, linear warm-up over a tenth, cosine to zero."""

    epochs: float
    learning_rate: float
    batch_tokens: int
    seed: int


@dataclass(frozen=True)
class _Item:
    """One batch with what the teacher and the prefix gave for it."""

    batch: Batch
    prefix: Tensor
    teacher: Tensor


def lower(
    program: Program,
    loaded: Loaded,
    texts: Sequence[Encoded],
    start: WeightPatch,
    schedule: Schedule,
    *,
    tick: Callable[[int, float], None] = lambda _n, _loss: None,
) -> WeightPatch:
    """Return `start` trained until the plain model imitates `program` on `texts`.

    Args:
        start: the patch to begin from; its modules and ranks are what is trained.
        tick: called after each step with the tokens done and the mean KL of the step, nats a token.
    """
    factors = {
        name: (nn.Parameter(edit.B.clone()), nn.Parameter(edit.A.clone())) for name, edit in start.low_rank.items()
    }
    patch = WeightPatch({name: LowRank(B, A) for name, (B, A) in factors.items()})
    first = program.first_layer
    items = list(_items(program, loaded, texts, first, schedule.batch_tokens))
    steps = max(1, math.ceil(schedule.epochs * len(items)))
    optimizer = torch.optim.AdamW(_groups(factors, schedule.learning_rate), weight_decay=0.0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _shape(step, steps))
    order = random.Random(schedule.seed)
    queue: list[_Item] = []
    for _step in range(steps):
        if not queue:
            queue = order.sample(items, len(items))
        item = queue.pop()
        optimizer.zero_grad()
        with applied(loaded.model, patch), torch.enable_grad():
            loss = _backward(loaded, item, first)
        nn.utils.clip_grad_norm_([p for pair in factors.values() for p in pair], 1.0)
        optimizer.step()
        rate.step()
        tick(item.batch.n_tokens, loss)
    return WeightPatch({name: LowRank(B.detach(), A.detach()) for name, (B, A) in factors.items()})


def _groups(factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], rate: float) -> list[dict[str, object]]:
    """A group a factor: AdamW's step has the size of the rate whatever the gradient's, so it is taken
    relative to each factor's own size (its root mean square)."""
    groups: list[dict[str, object]] = []
    for pair in factors.values():
        for factor in pair:
            size = float(factor.detach().square().mean().sqrt())
            groups.append({"params": [factor], "lr": rate * max(size, 1e-8)})
    return groups


def _shape(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _items(
    program: Program, loaded: Loaded, texts: Sequence[Encoded], first: int, batch_tokens: int
) -> Iterator[_Item]:
    for batch in batches(texts, int(loaded.tokenizer.pad_token_id), max_tokens=batch_tokens):
        batch = batch.to(loaded.device)
        with torch.no_grad():
            prefix = run_span(loaded.model, batch.input_ids, batch.attention_mask, stop=first)
            with steered(loaded.model, program, roles=batch.roles):
                teacher = run_span(loaded.model, batch.input_ids, batch.attention_mask, start=first, hidden=prefix)
        yield _Item(batch, prefix, teacher[batch.attention_mask.bool()])


def _backward(loaded: Loaded, item: _Item, first: int) -> float:
    """Accumulate the gradient of the mean KL(teacher || student) over real tokens; returns the loss."""
    batch = item.batch
    final = run_span(loaded.model, batch.input_ids, batch.attention_mask, start=first, hidden=item.prefix)
    student = final[batch.attention_mask.bool()]
    leaf = student.detach().requires_grad_()
    total = 0.0
    for part in chunks(leaf.shape[0]):
        with torch.no_grad():
            log_p = log_softmax(readout(loaded.model, item.teacher[part]))
        log_q = log_softmax(readout(loaded.model, leaf[part]))
        loss = (log_p.exp() * (log_p - log_q)).sum() / leaf.shape[0]
        loss.backward()
        total += float(loss.detach())
    student.backward(leaf.grad)
    return total
