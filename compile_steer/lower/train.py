"""Train a patch end to end until the model that wears it is the steered one, whatever the patch is made of.

A sixth of the batches is held out and measures the outcome. The state is kept every so many steps, so that a run
that was stopped goes on there and ends in the same result.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compile_steer.common.progress import Advance
from compile_steer.lower.job import Job
from compile_steer.lower.objective import OBJECTIVES, Objective
from compile_steer.lower.optimise import held_out_split, set_rate
from compile_steer.lower.options import Training
from compile_steer.lower.suffix import Item, Suffix
from compile_steer.models.load import DTYPES
from compile_steer.models.logprobs import divergence
from compile_steer.models.tokens import Encoded
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program


def train(
    job: Job,
    texts: Sequence[Encoded],
    patch: WeightPatch,
    optimizer: torch.optim.Optimizer,
    options: Training,
    objective: str,
    name: str,
    advance: Advance,
) -> tuple[float, float]:
    """Train what `optimizer` holds; return the mean KL(steered || student) on held-out batches before and after.

    Args:
        texts: of the steered model; where the objective is on-policy the student continues their prompts anew.
        patch: on live parameters, those of `optimizer`.
        objective: a name in `OBJECTIVES`.
        name: under which the state is kept and the curve is recorded.
        advance: called with the number of texts just seen.
    """
    run = _Run(job, texts, patch, optimizer, options, OBJECTIVES[objective])
    before = run.measure()
    step, losses = _restore(job, name, optimizer)
    while step < run.steps:
        fresh = step % run.epoch == 0
        if fresh if run.objective.on_policy else step % options.save_every == 0:
            _keep(job, name, optimizer, step, losses)
        if fresh or not run.items:
            run.start_epoch(step // run.epoch)
        losses.append(run.step(step))
        advance(len(texts) / run.epoch)
        step += 1
    after = run.measure()
    job.curves[name] = {"loss": losses, "held_out_kl": [before, after]}
    return before, after


@dataclass(frozen=True)
class Batches:
    """The texts in batches, a sixth of them held out, with the suffix that is run on them; `texts` are those seen."""

    whole: Suffix
    held_out: list[Item]
    seen: list[Item]
    texts: list[Encoded]

    @staticmethod
    def of(job: Job, texts: Sequence[Encoded], patch: WeightPatch, max_tokens: int) -> Batches:
        """Shared below the first block that the program or `patch` changes."""
        first = min(job.program.first_layer, patch.first_layer(job.loaded.layout))
        whole = Suffix(job.loaded, job.program, first)
        shuffled = whole.items(texts, max_tokens)
        random.Random(job.seed).shuffle(shuffled)
        held_out, seen = held_out_split(shuffled)
        return Batches(whole, held_out, seen, [texts[row] for item in seen for row in item.batch.rows])


class _Run:
    """One training: its batches, and a step of it."""

    def __init__(
        self,
        job: Job,
        texts: Sequence[Encoded],
        patch: WeightPatch,
        optimizer: torch.optim.Optimizer,
        options: Training,
        objective: Objective,
    ) -> None:
        self.job, self.patch, self.optimizer, self.options, self.objective = job, patch, optimizer, options, objective
        parts = Batches.of(job, texts, patch, options.batch_tokens)
        self._whole, self._held_out, self._texts = parts.whole, parts.held_out, parts.texts
        end = None if self.objective.at_end else 1 + max(one.site.changes_from for one in job.program.interventions)
        self.suffix = replace(
            parts.whole, stop=end, recompute_every=options.recompute_every, dtype=DTYPES[options.precision]
        )
        self._seen = parts.seen if end is None else [self.suffix.item(item.batch) for item in parts.seen]
        self.epoch = math.ceil(len(parts.seen) / options.accumulate)
        self.steps = max(1, math.ceil(options.epochs * self.epoch))
        self.items: list[Item] = []
        self._neutral = self._neutral_items() if options.neutral_weight > 0 else []

    def measure(self) -> float:
        return self._whole.mean_kl(self._held_out, self.patch)

    def start_epoch(self, epoch: int) -> None:
        """The batches of the epoch: the same every time, or the student's own texts of now."""
        self.items = self._seen
        if self.objective.on_policy:
            with with_patch(self.job.loaded.model, self.patch):
                written = self.job.write(self._texts, None, seed=self.job.seed + 7919 * (epoch + 1))
            self.items = self.suffix.items(written, self.options.batch_tokens)

    def step(self, step: int) -> float:
        """One step over `accumulate` batches; returns their mean loss."""
        model, count = self.job.loaded.model, self.options.accumulate
        self.optimizer.zero_grad()
        loss = 0.0
        with with_patch(model, self.patch), torch.enable_grad():
            for n in range(count):
                item = self.items[(step % self.epoch * count + n) % len(self.items)]
                loss += self.objective.backward(model, item.teacher, self.suffix.student(item), 1.0 / count) / count
            if self._neutral:
                self._penalty(*self._neutral[step % len(self._neutral)])
        nn.utils.clip_grad_norm_(_parameters(self.optimizer), 1.0)
        set_rate(self.optimizer, step, self.steps)
        self.optimizer.step()
        return loss

    def _neutral_items(self) -> list[tuple[Item, float]]:
        """Batches of the base's own texts with its states, and how far from them the steered model is, nats a token."""
        job, whole = self.job, self._whole
        base = replace(whole, program=Program((), job.program.model, job.program.revision))
        written = job.write(self._texts, None, seed=job.seed + 7907)
        found = []
        for item in base.items(written, self.options.batch_tokens):
            hooked = whole.item(item.batch)
            found.append((item, self._kl(item.teacher, hooked.teacher)))
        return found

    def _penalty(self, item: Item, allowed: float) -> None:
        """The gradient of the neutral weight times what KL(base || student) exceeds KL(base || steered) by."""
        student = replace(self.suffix, stop=None).student(item)
        if self._kl(item.teacher, student.detach()) > allowed:
            forward = OBJECTIVES["forward_kl"].backward
            forward(self.job.loaded.model, item.teacher, student, self.options.neutral_weight)

    def _kl(self, states_p: Tensor, states_q: Tensor) -> float:
        model = self.job.loaded.model
        return divergence(model, states_p, model, states_q).mean


def _keep(job: Job, name: str, optimizer: torch.optim.Optimizer, step: int, losses: list[float]) -> None:
    """Keep the parameters and everything that the optimizer knows of them, before `step`."""
    state = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {f"parameter.{n}": value for n, value in enumerate(_parameters(optimizer))}
    numbers: dict[str, float] = {}
    for n, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"state.{n}.{key}"] = value
            else:
                numbers[f"state.{n}.{key}"] = value
    job.work.keep(name, tensors, {"step": step, "losses": losses, "numbers": numbers})


def _restore(job: Job, name: str, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """(step, losses so far) of what was kept, put into the parameters and the optimizer; (0, []) where nothing was."""
    found = job.work.kept(name)
    if found is None:
        return 0, []
    tensors, kept = found
    with torch.no_grad():
        for n, parameter in enumerate(_parameters(optimizer)):
            parameter.copy_(tensors[f"parameter.{n}"])
    state: dict[int, dict[str, Tensor | float]] = {}
    for place, value in (*tensors.items(), *kept["numbers"].items()):
        if place.startswith("state."):
            _state, n, key = place.split(".", 2)
            state.setdefault(int(n), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(kept["step"]), list(kept["losses"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
