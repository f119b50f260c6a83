"""`distill`: a low-rank patch trained to be the steered model, block by block and then end to end.

First the closed form's walk, in which each intervened block is also trained on its own output (`block_fit`): that is
where the error is made, and a step there costs a fraction of a full one. Then the divergence itself, end to end.

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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compile_steer.errors import CannotLower
from compile_steer.hooks import PAD, steered
from compile_steer.layout import Layout
from compile_steer.lower import closed_form
from compile_steer.lower.block_fit import fit_block, held_out_split, optimizer_of, random_edits, trainable
from compile_steer.lower.job import Job
from compile_steer.lower.walk import Walk
from compile_steer.metrics import chunks, divergence, log_softmax
from compile_steer.models import Loaded
from compile_steer.patch import LowRank, WeightPatch, applied, linear_shape
from compile_steer.program import Program
from compile_steer.progress import Tick
from compile_steer.replay import readout, run_span
from compile_steer.settings import Distill
from compile_steer.tokens import Batch, Encoded, batches


@dataclass(frozen=True)
class Item:
    """One batch with what the prefix [batch, time, d_model] and the teacher [n_tokens, d_model] gave for it."""

    batch: Batch
    prefix: Tensor | None
    teacher: Tensor


def lower(job: Job) -> WeightPatch:
    """Return the start patch trained on the divergence, or the start itself if training made it worse."""
    options = job.options.distill
    _require_rank(job.loaded.layout, job.program.first_layer, options.rank)
    if options.start == "closed_form":
        start = fitted_patch(job)
    else:
        start = random_patch(job.loaded.layout, job.program.first_layer, options.rank, job.seed)
    texts = job.training_texts
    with job.meter.phase("distill: forward KL", (1 + options.epochs) * len(texts)) as tick:
        return train(job.program, job.loaded, texts, start, options, job.seed, tick)


def fitted_patch(job: Job) -> WeightPatch:
    """The closed form's walk, with every intervened block trained on its own output before the next is solved."""
    options, texts = job.options.distill, job.regression_texts
    stages = closed_form.plan_stages(job)
    blocks = {one.site.changes_from for one in job.program.interventions}
    total = (1 + len(stages)) * len(texts) + options.block_steps * len(blocks)
    with job.meter.phase("distill: block by block", total) as tick:

        def refine(walk: Walk, block: int) -> None:
            if block in blocks and options.block_steps > 0:
                fit_block(
                    walk,
                    block,
                    rank=options.rank,
                    steps=options.block_steps,
                    rate=options.block_learning_rate,
                    seed=job.seed,
                    tick=tick,
                )

        return closed_form.solve_stages(
            job.program, job.loaded, texts, stages, tick, refine=refine, max_tokens=options.block_batch_tokens
        )


def _require_rank(layout: Layout, block: int, rank: int) -> None:
    for name, module in layout.linears(block).items():
        if rank > min(linear_shape(module)):
            d_out, d_in = linear_shape(module)
            raise CannotLower(f"compile.distill.rank {rank} is above what {name} ({d_out} x {d_in}) can have.")


def random_patch(layout: Layout, first: int, rank: int, seed: int) -> WeightPatch:
    """LoRA's own start for every Linear of the blocks from `first` on."""
    edits: dict[str, LowRank] = {}
    for block in range(first, layout.n_layers):
        edits.update(random_edits(layout, block, rank, seed))
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
    """Forward KL, end to end. A sixth of the batches is held out; the start is returned where the result is
    not better on it."""
    device = loaded.device
    factors = trainable(start.low_rank, device)
    patch = WeightPatch({name: LowRank(B, A) for name, (B, A) in factors.items()})
    first = program.first_layer
    items = []
    for batch in batches(texts, int(loaded.tokenizer.pad_token_id), max_tokens=options.batch_tokens):
        items.append(prepared(program, loaded, batch.to(device), first))
        tick(len(batch.rows))
    random.Random(seed).shuffle(items)
    held_out, items = held_out_split(items)
    before = mean_kl(loaded, held_out, first, start)

    steps = max(1, math.ceil(options.epochs * len(items)))
    optimizer, schedule = optimizer_of(factors, options.learning_rate, steps)
    parameters = [factor for pair in factors.values() for factor in pair]
    for step in range(steps):
        item = items[step % len(items)]
        optimizer.zero_grad()
        with applied(loaded.model, patch), torch.enable_grad():
            backward(loaded, item, first)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        tick(len(item.batch.rows))
    result = WeightPatch({name: LowRank(B.detach().cpu(), A.detach().cpu()) for name, (B, A) in factors.items()})
    return result if mean_kl(loaded, held_out, first, result) < before else start


def prepared(program: Program, loaded: Loaded, batch: Batch, first: int) -> Item:
    """Run the shared prefix and the teacher over one batch."""
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        prefix = run_span(loaded.model, ids, mask, stop=first) if first else None
        with steered(loaded.model, program, roles=batch.roles):
            teacher = run_span(loaded.model, ids, mask, start=first, hidden=prefix)
    return Item(batch, prefix, teacher[batch.roles != PAD])


def _student(loaded: Loaded, item: Item, first: int) -> Tensor:
    """The student's final hidden states of the real tokens, [n_tokens, d_model]; its patch must be on."""
    batch = item.batch
    final = run_span(loaded.model, batch.input_ids, batch.attention_mask, start=first, hidden=item.prefix)
    return final[batch.roles != PAD]


def backward(loaded: Loaded, item: Item, first: int) -> None:
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


def mean_kl(loaded: Loaded, items: Sequence[Item], first: int, patch: WeightPatch) -> float:
    """Mean KL(teacher || student) over the items' real tokens, nats a token."""
    total = count = 0.0
    for item in items:
        with applied(loaded.model, patch), torch.no_grad():
            student = _student(loaded, item, first)
        found = divergence(loaded.model, item.teacher, loaded.model, student)
        total += float(found.kl.sum())
        count += len(found.kl)
    return total / count
