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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compile_steer.behaviour import Batch, Encoded, batches
from compile_steer.hooks import PAD, steered
from compile_steer.layout import Layout
from compile_steer.lower import closed_form
from compile_steer.lower.job import Job
from compile_steer.metrics import chunks, divergence, log_softmax
from compile_steer.models import Loaded
from compile_steer.patch import LowRank, WeightPatch, applied, linear_shape
from compile_steer.program import Program
from compile_steer.progress import Tick
from compile_steer.recipe import Distill
from compile_steer.replay import readout, run_span

_HELD_OUT_EVERY = 6
_Factors = Mapping[str, tuple[nn.Parameter, nn.Parameter]]


@dataclass(frozen=True)
class _Item:
    """One batch with what the prefix [batch, time, d_model] and the teacher [n_tokens, d_model] gave for it."""

    batch: Batch
    prefix: Tensor | None
    teacher: Tensor


def refusal(program: Program, layout: Layout) -> str | None:
    """Why this backend cannot lower the (canonical) program, or None."""
    return closed_form.refusal(program, layout)


def lower(job: Job) -> WeightPatch:
    """Return the start patch trained on the divergence, or the start itself if training made it worse."""
    options = job.options.distill
    if options.start == "closed_form":
        start = closed_form.lower(job)
    else:
        start = random_patch(job.loaded.layout, job.program.first_layer, options.rank, job.seed)
    texts = job.training_texts
    with job.meter.phase("distill: forward KL", (1 + options.epochs) * len(texts)) as tick:
        return train(job.program, job.loaded, texts, start, options, job.seed, tick)


def random_patch(layout: Layout, first: int, rank: int, seed: int) -> WeightPatch:
    """LoRA's own start for every Linear of the blocks from `first` on: A random, B zero."""
    generator = torch.Generator().manual_seed(seed)
    edits = {}
    for layer in range(first, layout.n_layers):
        for name, module in layout.blocks[layer].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                d_out, d_in = linear_shape(module)
                A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
                edits[f"{layout.family.blocks}.{layer}.{name}"] = LowRank(torch.zeros(d_out, rank), A)
    return WeightPatch(edits)


def train(
    program: Program,
    loaded: Loaded,
    texts: Sequence[Encoded],
    start: WeightPatch,
    options: Distill,
    seed: int,
    tick: Tick,
) -> WeightPatch:
    """AdamW with linear warm-up over a tenth of the steps and cosine decay to zero.

    A sixth of the batches is held out; the start is returned where the result is not better on it.
    """
    device = loaded.device
    factors = {
        name: (nn.Parameter(edit.B.to(device).clone()), nn.Parameter(edit.A.to(device).clone()))
        for name, edit in start.low_rank.items()
    }
    patch = WeightPatch({name: LowRank(B, A) for name, (B, A) in factors.items()})
    first = program.first_layer
    items = []
    for batch in batches(texts, int(loaded.tokenizer.pad_token_id), max_tokens=options.batch_tokens):
        items.append(_item(program, loaded, batch.to(device), first))
        tick(len(batch.rows))
    random.Random(seed).shuffle(items)
    held_out, items = items[::_HELD_OUT_EVERY], [item for n, item in enumerate(items) if n % _HELD_OUT_EVERY] or items
    before = _mean_kl(loaded, held_out, first, start)

    steps = max(1, math.ceil(options.epochs * len(items)))
    optimizer = torch.optim.AdamW(_groups(factors, options.learning_rate), weight_decay=0.0, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _shape(step, steps))
    parameters = [factor for pair in factors.values() for factor in pair]
    for step in range(steps):
        item = items[step % len(items)]
        optimizer.zero_grad()
        with applied(loaded.model, patch), torch.enable_grad():
            _backward(loaded, item, first)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        tick(len(item.batch.rows))
    result = WeightPatch({name: LowRank(B.detach().cpu(), A.detach().cpu()) for name, (B, A) in factors.items()})
    return result if _mean_kl(loaded, held_out, first, result) < before else start


def _groups(factors: _Factors, rate: float) -> list[dict[str, object]]:
    """A group a factor: AdamW's step has the size of the rate whatever the gradient's, so the rate is taken
    relative to the factor's own root mean square (its partner's, for a factor that starts at zero)."""
    groups: list[dict[str, object]] = []
    for B, A in factors.values():
        sizes = [float(factor.detach().square().mean().sqrt()) for factor in (B, A)]
        for factor, size, other in zip((B, A), sizes, reversed(sizes), strict=True):
            groups.append({"params": [factor], "lr": rate * (size or other)})
    return groups


def _shape(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _item(program: Program, loaded: Loaded, batch: Batch, first: int) -> _Item:
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        prefix = run_span(loaded.model, ids, mask, stop=first) if first else None
        with steered(loaded.model, program, roles=batch.roles):
            teacher = run_span(loaded.model, ids, mask, start=first, hidden=prefix)
    return _Item(batch, prefix, teacher[batch.roles != PAD])


def _student(loaded: Loaded, item: _Item, first: int) -> Tensor:
    """The student's final hidden states of the real tokens, [n_tokens, d_model]; its patch must be on."""
    batch = item.batch
    final = run_span(loaded.model, batch.input_ids, batch.attention_mask, start=first, hidden=item.prefix)
    return final[batch.roles != PAD]


def _backward(loaded: Loaded, item: _Item, first: int) -> None:
    """Accumulate the gradient of the mean KL(teacher || student) over the batch's real tokens."""
    student = _student(loaded, item, first)
    leaf = student.detach().requires_grad_()
    for part in chunks(leaf.shape[0]):
        with torch.no_grad():
            log_p = log_softmax(readout(loaded.model, item.teacher[part]))
        log_q = log_softmax(readout(loaded.model, leaf[part]))
        loss = (log_p.exp() * (log_p - log_q)).sum() / leaf.shape[0]
        loss.backward()
    student.backward(leaf.grad)


def _mean_kl(loaded: Loaded, items: Sequence[_Item], first: int, patch: WeightPatch) -> float:
    """Mean KL(teacher || student) over the items' real tokens, nats a token."""
    total = count = 0.0
    for item in items:
        with applied(loaded.model, patch), torch.no_grad():
            student = _student(loaded, item, first)
        found = divergence(loaded.model, item.teacher, loaded.model, student)
        total += float(found.kl.sum())
        count += len(found.kl)
    return total / count
