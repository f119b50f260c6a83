"""`distill`: a low-rank patch trained to be the steered model, block by block and then end to end.

First the closed form's pass over the blocks, in which each intervened block is also trained on its own output: that is
where the error is made, and a step there runs one block instead of all. Then the objective, end to end (`training`).

The objective `likelihood` is the baseline that most people would use: the likelihood of the steered model's samples, by
TRL's SFTTrainer. Texts, start, rank and optimizer are the same, but it sees one sampled token where the divergences see
the whole distribution.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.pytorch_utils import Conv1D

from compile_steer.common.distributed import count, require_alone, sum_over_all
from compile_steer.common.errors import RecipeError, require_library
from compile_steer.common.progress import Advance
from compile_steer.lowering import closed_form
from compile_steer.lowering.job import Curve, Lowering, require_rank
from compile_steer.lowering.optimizer import relative_adamw, trainable
from compile_steer.lowering.options import DistillOptions
from compile_steer.lowering.teacher_student import ActivationBatch, TeacherStudent, total_weight
from compile_steer.lowering.training import (
    gradient_steps,
    held_out_split,
    split_batches,
    squared_error,
    train,
)
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import RESPONSE
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, linear_shape
from compile_steer.steering.patch import WeightPatch, with_patch

_PASS = "distill block by block"
_STRENGTHS = (1.0, 1.0, -1.0)  # of the program and the edit in turn, step by step


def lower(lowering: Lowering) -> WeightPatch:
    """The start patch trained end to end, or the start itself if training made it worse or there is nothing left to train for."""
    options, layout, first = lowering.options.distill, lowering.loaded.layout, lowering.program.first_layer
    require_rank(layout, first, options.rank, "compile.distill.rank")
    lowering.loaded.require_resident("compile.distill")
    if options.shard and count() == 1:
        raise RecipeError("compile.distill.shard lays the base over several processes, and there is one; use torchrun.")
    if options.objective == "likelihood":
        require_alone("compile.distill.objective likelihood")
        require_library("trl", "trl", "compile.distill.objective 'likelihood'", "Or choose another objective.")
    random_start = options.start == "random"
    if options.shard:
        _ = lowering.training_texts  # cached: a base that is laid over processes writes none
        if not random_start:
            _ = lowering.regression_texts
        shard_blocks(lowering.loaded)
    if random_start:
        start = random_patch(layout, first, options.rank, lowering.seed)
    elif exact := _exact_closed_form(lowering):
        return exact
    else:
        start = fit_blocks(lowering)
        if _is_exact(lowering, _PASS):
            return start
    texts = lowering.training_texts
    with lowering.progress.phase(f"distill: {options.objective}", options.epochs * len(texts)) as advance:
        return train_end_to_end(lowering, texts, start, advance)


def _is_exact(lowering: Lowering, name: str) -> bool:
    """Whether a pass of the closed form has left nothing to train."""
    return lowering.exact.get(name, set()) >= lowering.program.changed_blocks


def _exact_closed_form(lowering: Lowering) -> WeightPatch | None:
    """The patch of `closed_form` where the recipe has that too and it is exact, which only that of constants is."""
    program, found = lowering.program, lowering.patches.get("closed_form")
    constants = all(map(program.adds_constant, program.changed_blocks))
    if found is None or lowering.options.dial or not constants:
        return None
    if closed_form.NAME not in lowering.exact:  # an earlier run has made it, and what it left is not on disk
        closed_form.lower(lowering)
    return found if _is_exact(lowering, closed_form.NAME) else None


def shard_blocks(loaded: LoadedModel) -> None:
    """Lay the weights of each block over all processes: a block is whole while it computes alone. For good.

    Every process must run every block equally often from here on. The embeddings and the head stay whole: they are called
    apart from the blocks, chunk by chunk.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(loaded.device.type, (count(),))
    for block in loaded.layout.blocks:
        if not isinstance(block, FSDPModule):
            # Said, for by default it is not where a block is called by itself.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def train_end_to_end(lowering: Lowering, texts: Sequence[Encoded], start: WeightPatch, advance: Advance) -> WeightPatch:
    """Train `start` on `texts` by the recipe's objective; returned as it is where the held-out KL does not fall."""
    options = lowering.options.distill
    if options.objective == "likelihood":
        return _train_likelihood(lowering, texts, start, advance)
    patch = WeightPatch(trainable(start.low_rank, lowering.loaded.device))
    optimizer = relative_adamw(patch.low_rank, options.learning_rate)
    before, after = train(lowering, texts, patch, optimizer, options, "distill", advance)
    return _on_cpu(patch.low_rank) if after < before else start


def _on_cpu(trained: Mapping[str, LowRank]) -> WeightPatch:
    return WeightPatch({name: edit.detach().to("cpu") for name, edit in trained.items()})


def random_patch(layout: Layout, first: int, rank: int, seed: int, *, stop: int | None = None) -> WeightPatch:
    """LoRA's own start for every Linear of blocks `first` to `stop` - 1: A random, B zero, so nothing changes yet."""
    edits = {}
    for block in range(first, layout.n_layers if stop is None else stop):
        generator = torch.Generator().manual_seed(seed + block)  # the same edits whichever block is the first
        for name, module in layout.linears(block).items():
            d_out, d_in = linear_shape(module)
            A = (2 * torch.rand(rank, d_in, generator=generator) - 1) / math.sqrt(d_in)
            edits[name] = LowRank(torch.zeros(d_out, rank), A)
    return WeightPatch(edits)


def fit_blocks(lowering: Lowering) -> WeightPatch:
    """The closed form's pass, with every intervened block trained on its own output before the next is solved."""
    options = lowering.options.distill
    intervened = lowering.program.changed_blocks

    def refine(models: TeacherStudent, block: int, advance: Advance) -> None:
        if block in models.exact:
            advance(options.block_steps)
        elif block in intervened and options.block_steps > 0:
            lowering.curves[f"block {block}"] = fit_block(models, block, options, lowering.seed, advance)

    return closed_form.lower(
        lowering,
        refine=refine,
        refine_steps=options.block_steps * len(intervened),
        max_tokens=options.block_batch_tokens,
        name=_PASS,
    )


def fit_block(models: TeacherStudent, block: int, options: DistillOptions, seed: int, advance: Advance) -> Curve:
    """Train low-rank edits of all Linears of one block, so that its output is the steered block's.

    The regression of `closed_form` is linear in what an output projection reads; gate, up, query, key and value are not
    reached by it. Here all are trained together on the weighted mean of ||h_steered - h_student||^2 / ||h_steered||^2, h the
    block's output, in front of norms times its measured sensitivity; at strengths of 1 and -1 where it can be a dial. The edits
    that are there are the start, filled up to the rank. The result replaces them where it is better on held-out batches.

    Returns:
        The loss of every step, and the held-out error before and after.
    """
    loaded = models.loaded
    trained = trainable(_block_start(models, block, options.rank, seed), loaded.device)
    strengths = _STRENGTHS if models.is_dial(block) else (1.0,)
    # Edits of other blocks stay on while this one is trained.
    before = models.patch
    after = WeightPatch({**before.low_rank, **trained})
    shuffled = list(models.batches)
    random.Random(seed).shuffle(shuffled)
    held_out, seen = held_out_split(shuffled)

    def errors(patch: WeightPatch, activations: ActivationBatch, strength: float = 1.0) -> torch.Tensor:
        # Only this block is run: a step costs 1/n_layers of one end to end.
        with with_patch(loaded.model, strength * patch):
            student = models.run_block(activations.batch, activations.student, block)
        target = activations.target if strength == 1 else models.steered_output(activations, block, strength)
        real, sensitivity = activations.real, models.sensitivity.get(block, torch.ones((), device=target.device))
        each = squared_error(student[real] * sensitivity, target[real] * sensitivity)
        return activations.weights.to(each.device)[real] * each

    def size(activations: ActivationBatch) -> float:
        return total_weight(activations.batch, models.program)

    def backward(step: int) -> float:
        if step % len(seen) == 0:
            random.Random(seed + step).shuffle(seen)
        activations = seen[step % len(seen)]
        loss = errors(after, activations, strengths[step % len(strengths)]).sum() / size(activations)
        loss.backward()
        return float(loss.detach())

    losses = []
    with torch.enable_grad():
        optimizer = relative_adamw(trained, options.block_learning_rate)
        for loss in gradient_steps(optimizer, backward, options.block_steps):
            losses.append(loss)
            advance(1)
    held_out_errors = []
    for patch in (before, after):
        with torch.no_grad():
            total = torch.stack([errors(patch, activations).sum() for activations in held_out]).sum()
        sum_over_all(total)
        held_out_errors.append(float(total) / sum(map(size, held_out)))
    if held_out_errors[1] < held_out_errors[0]:
        models.solved.update({name: edit.detach() for name, edit in trained.items()})
    return {"loss": losses, "held_out_error": held_out_errors}


def _block_start(models: TeacherStudent, block: int, rank: int, seed: int) -> dict[str, LowRank]:
    """Edits of all Linears of a block that change what is solved there by nothing, each of at least `rank`."""
    start = dict(random_patch(models.loaded.layout, block, rank, seed, stop=block + 1).low_rank)
    for name, fresh in start.items():
        edit = models.solved.get(name)
        if edit is not None:
            start[name] = edit
            missing = fresh.rank - edit.rank
            if missing > 0:
                # Random rows of the size of those that are there, and zero columns.
                rows = fresh.A[:missing].to(edit.A)
                rows = rows * (edit.A.square().mean() / rows.square().mean()).sqrt()
                start[name] = edit + LowRank(edit.B.new_zeros(len(edit.B), missing), rows)
    return start


def _train_likelihood(
    lowering: Lowering, texts: Sequence[Encoded], start: WeightPatch, advance: Advance
) -> WeightPatch:
    """The patch trained by TRL on the responses, or `start` where its KL on the held-out batches is not lower."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig, SFTTrainer

    options, loaded = lowering.options.distill, lowering.loaded
    suffix, held_out, seen = split_batches(lowering, texts, start, options.batch_tokens)
    before = suffix.mean_kl(held_out, start)
    # 1. The start as a LoRA, on a copy: a trainer leaves marks on the model that it is given.
    modules = [loaded.layout.model.get_submodule(name) for name in start.low_rank]
    config = LoraConfig(
        r=start.max_rank,
        lora_alpha=start.max_rank,
        target_modules=sorted(start.low_rank),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(copy.deepcopy(loaded.model), config)
    factors: dict[str, LowRank] = {}
    for name, edit in start.low_rank.items():
        module: Any = wrapped.get_submodule(f"base_model.model.{name}")
        factors[name] = LowRank(module.lora_B["default"].weight, module.lora_A["default"].weight)
        padded = edit.padded(start.max_rank)
        with torch.no_grad():
            factors[name].B.copy_(padded.B)
            factors[name].A.copy_(padded.A)
    # 2. Train it in place on the responses alone.
    seen_texts = [texts[row] for batch in seen for row in batch.batch.rows]
    mean_length = sum(len(text.ids) for text in seen_texts) / len(seen_texts)
    rows = [
        {"input_ids": list(text.ids), "completion_mask": [int(role == RESPONSE) for role in text.roles]}
        for text in seen_texts
    ]
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=max(1, round(options.batch_tokens / mean_length)),
            gradient_accumulation_steps=options.accumulate,
            gradient_checkpointing=options.recompute_every == 1,
            bf16=options.precision == "bfloat16",
            use_cpu=loaded.device.type == "cpu",
            completion_only_loss=True,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=lowering.seed,
        )
        trainer = SFTTrainer(
            wrapped,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=loaded.tokenizer,
            optimizers=(relative_adamw(factors, options.learning_rate), None),
        )
        trainer.remove_callback(PrinterCallback)  # the losses are recorded, not printed
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # 3. Keep it where it helped.
    trained = _on_cpu(factors)
    advance(options.epochs * len(texts))
    after = suffix.mean_kl(held_out, trained)
    lowering.curves["distill"] = {"loss": losses, "held_out_kl": [before, after]}
    return trained if after < before else start
