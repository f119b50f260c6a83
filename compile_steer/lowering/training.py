"""Training: the objectives, the loop of gradient steps that every training uses, and the training end to end.

p is the steered model's next-token distribution, q the student's:

    forward_kl      KL(p || q)                                  on the steered model's own texts
    reverse_kl      KL(q || p)                                  on the student's own texts (on-policy)
    jensen_shannon  KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2   (Agarwal et al. 2306.13649, beta 1/2)
    hidden          ||h_p - h_q||^2 / ||h_p||^2                 after the last intervened block (LoRRA, Zou et al. 2310.01405)

The likelihood of steered samples is the fifth; see `distill`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from compile_steer.common.distributed import sum_over_all
from compile_steer.common.progress import Advance
from compile_steer.lowering.job import Lowering, SavedState
from compile_steer.lowering.options import TrainingOptions
from compile_steer.lowering.teacher_student import SuffixModel, TeacherBatch
from compile_steer.models.forward import lm_head
from compile_steer.models.load import DTYPES
from compile_steer.models.logprobs import chunks, log_softmax, own_divergence
from compile_steer.models.tokens import Encoded
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program

T = TypeVar("T")

_HELD_OUT_EVERY = 6  # one batch in six decides whether the training helped


# (model, batch, student, factor) -> the weighted mean loss of the student's states [n_tokens, d_model]; adds `factor` times its
# gradient to what they were computed from.
Backward = Callable[[nn.Module, TeacherBatch, Tensor, float], float]


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_forward_kl(log_p, log_m) + _forward_kl(log_q, log_m))


def _on_logits(per_token: Callable[[Tensor, Tensor], Tensor]) -> Backward:
    """The weighted mean of `per_token(log_p, log_q)` [n]."""

    def backward(model: nn.Module, batch: TeacherBatch, student: Tensor, factor: float) -> float:
        # Chunk by chunk up to the states, so that n x vocabulary logits never exist; then once through the student.
        leaf, total = student.detach().requires_grad_(), 0.0
        leaf.grad = torch.zeros_like(leaf)  # of a process that has no token of the batch
        for part in chunks(leaf.shape[0], model):
            with torch.no_grad():
                log_p = log_softmax(lm_head(model, batch.teacher[part]))
            losses = per_token(log_p, log_softmax(lm_head(model, leaf[part])))
            loss = batch.weighted(losses, part) / batch.total_weight
            (factor * loss).backward()
            total += float(loss.detach())
        student.backward(leaf.grad)
        return total

    return backward


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """||h_p - h_q||^2 / ||h_p||^2 of each token [n], of states [n, d_model]: relative, as the norms above see them."""
    target = teacher.float()
    return (student.float() - target).square().sum(dim=1) / target.square().sum(dim=1).clamp(min=1e-12)


def _hidden(_model: nn.Module, batch: TeacherBatch, student: Tensor, factor: float) -> float:
    loss = batch.weighted(squared_error(student, batch.teacher)) / batch.total_weight
    (factor * loss).backward()
    return float(loss.detach())


OBJECTIVES: dict[str, Backward] = {
    "forward_kl": _on_logits(_forward_kl),
    "reverse_kl": _on_logits(lambda log_p, log_q: _forward_kl(log_q, log_p)),
    "jensen_shannon": _on_logits(_jensen_shannon),
    "hidden": _hidden,
}


def gradient_steps(
    optimizer: torch.optim.Optimizer,
    backward: Callable[[int], float],
    steps: int,
    *,
    first: int = 0,
    max_norm: float | None = None,
) -> Iterator[float]:
    """Take the steps from `first` to `steps` - 1, and yield the loss of each once it is taken.

    The rate is each group's own, warmed up linearly over a tenth of the steps, then decayed to zero by a cosine.

    Args:
        backward: accumulates the gradient of the numbered step and returns its loss; the parts of all processes are summed.
        max_norm: to which the norm of the whole gradient is clipped.
    """
    warm = max(1, steps // 10)
    for step in range(first, steps):
        optimizer.zero_grad()
        loss = torch.tensor(backward(step), dtype=torch.float64)
        sum_over_all(loss, *(p.grad for p in _parameters(optimizer) if p.grad is not None))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(_parameters(optimizer), max_norm)
        shape = (step + 1) / warm
        if step >= warm:
            shape = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * shape
        optimizer.step()
        yield float(loss)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def held_out_split(items: Sequence[T]) -> tuple[list[T], list[T]]:
    """(held out, seen): a sixth is held out; a single item is both."""
    return list(items[::_HELD_OUT_EVERY]), [x for n, x in enumerate(items) if n % _HELD_OUT_EVERY] or list(items)


def split_batches(
    lowering: Lowering, texts: Sequence[Encoded], patch: WeightPatch, max_tokens: int
) -> tuple[SuffixModel, list[TeacherBatch], list[TeacherBatch]]:
    """(the blocks from the first one that the program or `patch` changes, held-out batches, batches to train on)."""
    first = min(lowering.program.first_layer, patch.first_layer(lowering.loaded.layout))
    suffix = SuffixModel(lowering.loaded, lowering.program, first)
    # Batches come sorted by length: shuffled, so that the steps do not go from short texts to long ones.
    shuffled = suffix.batches(texts, max_tokens)
    random.Random(lowering.seed).shuffle(shuffled)
    return suffix, *held_out_split(shuffled)


def train(
    lowering: Lowering,
    texts: Sequence[Encoded],
    patch: WeightPatch,
    optimizer: torch.optim.Optimizer,
    options: TrainingOptions,
    name: str,
    advance: Advance,
) -> tuple[float, float]:
    """Train a patch until the model under it is the steered one; return the mean KL(steered || student) on held-out
    batches before and after.

    The state is saved every so many steps, so that a run that was killed resumes there and ends in the same result.

    Args:
        texts: of the steered model; where the objective is on-policy the student continues their prompts again.
        patch: made of live parameters, those of `optimizer`.
        name: under which the state is saved and the curve is recorded.
        advance: called with the number of texts just seen.
    """
    model, objective = lowering.loaded.model, OBJECTIVES[options.objective]
    on_policy = options.objective == "reverse_kl"
    suffix, held_out, seen = split_batches(lowering, texts, patch, options.batch_tokens)
    seen_texts = [texts[row] for batch in seen for row in batch.batch.whole.rows]
    to_end = replace(suffix, recompute_every=options.recompute_every, dtype=DTYPES[options.precision])
    student = to_end
    if options.objective == "hidden":
        # It looks at the last intervened block; the held-out measure and the control always reach the end.
        student = replace(to_end, stop=1 + max(lowering.program.changed_blocks))
        seen = [student.run_teacher(batch.batch, batch.prefix) for batch in seen]
    epoch_steps = math.ceil(len(seen) / options.accumulate)
    steps = max(1, math.ceil(options.epochs * epoch_steps))
    control = _base_texts(lowering, suffix, seen_texts, options) if options.base_kl_weight > 0 else []
    before = suffix.mean_kl(held_out, patch)  # of the start, so before a saved state is loaded
    parameters = _named_parameters(patch)
    saved = lowering.state(name, options, texts, parameters)
    first, losses = _restore(saved, parameters, optimizer)
    batches: list[TeacherBatch] = []

    def backward(step: int) -> float:
        nonlocal batches
        new_epoch = step % epoch_steps == 0
        # On-policy a resumed run must write the same texts again, so it resumes where they are written.
        if new_epoch if on_policy else step % options.save_every == 0:
            values = {key: parameter.detach() for key, parameter in parameters.items()}
            moments = {key: optimizer.state.get(parameter, {}) for key, parameter in parameters.items()}
            saved.save({"step": step, "losses": losses, "parameters": values, "optimizer": moments})
        if new_epoch or not batches:
            batches = seen
            if on_policy:
                with with_patch(model, patch):
                    written = lowering.sample(seen_texts, None, seed=lowering.seed + 7919 * (step // epoch_steps + 1))
                batches = student.batches(written, options.batch_tokens)
        loss = 0.0
        with with_patch(model, patch), torch.enable_grad():
            for n in range(options.accumulate):
                batch = batches[(step % epoch_steps * options.accumulate + n) % len(batches)]
                mean = objective(model, batch, student.student(batch), 1.0 / options.accumulate)
                loss += mean / options.accumulate
            if control:
                # The gradient of what KL(base || student) exceeds KL(base || steered) by.
                batch, allowed = control[step % len(control)]
                states = to_end.student(batch)
                if _mean_kl(model, batch, states.detach()) > allowed:
                    OBJECTIVES["forward_kl"](model, batch, states, options.base_kl_weight)
        return loss

    for loss in gradient_steps(optimizer, backward, steps, first=first, max_norm=1.0):
        losses.append(loss)
        advance(len(texts) / epoch_steps)
    after = suffix.mean_kl(held_out, patch)
    lowering.curves[name] = {"loss": losses, "held_out_kl": [before, after]}
    return before, after


def _named_parameters(patch: WeightPatch) -> dict[str, Tensor]:
    """What is trained of a patch, by module and factor."""
    factors = {f"{module}.{key}": getattr(edit, key) for module, edit in patch.low_rank.items() for key in ("B", "A")}
    return {**factors, **patch.dense}


def _restore(
    saved: SavedState, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, list[float]]:
    """Put a saved state into the parameters and their optimizer, matched by name and shape; returns its (step, losses)."""
    state = saved.load()
    if state is None:
        return 0, []
    if {key: value.shape for key, value in state["parameters"].items()} != {k: p.shape for k, p in parameters.items()}:
        saved.discard("of other parameters")
        return 0, []
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state["parameters"][key])
    # An optimizer's own state is numbered in its own order.
    names = {id(parameter): key for key, parameter in parameters.items()}
    moments = [state["optimizer"][names[id(parameter)]] for parameter in _parameters(optimizer)]
    numbered = {number: moment for number, moment in enumerate(moments) if moment}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
    return state["step"], state["losses"]


def _base_texts(
    lowering: Lowering, suffix: SuffixModel, texts: Sequence[Encoded], options: TrainingOptions
) -> list[tuple[TeacherBatch, float]]:
    """Batches of texts that the base writes, with its own states, and KL(base || steered) on each, nats a token."""
    model = lowering.loaded.model
    base = replace(suffix, program=Program((), lowering.program.model, lowering.program.revision))
    control = []
    # 7907: a seed apart from those of the epochs, multiples of 7919.
    for batch in base.batches(lowering.sample(texts, None, seed=lowering.seed + 7907), options.batch_tokens):
        hooked = suffix.run_teacher(batch.batch, batch.prefix)
        own = replace(hooked, teacher=batch.teacher)  # its tokens count as in the program's own texts
        control.append((own, _mean_kl(model, own, hooked.teacher)))
    return control


def _mean_kl(model: nn.Module, batch: TeacherBatch, states: Tensor) -> float:
    """Weighted mean of KL(teacher || states) over the tokens of a batch in all processes, nats a token."""
    total = batch.weighted(own_divergence(model, batch.teacher, model, states).kl)
    sum_over_all(total)
    return float(total) / batch.total_weight
