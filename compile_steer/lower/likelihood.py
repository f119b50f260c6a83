"""What most people would do: a LoRA trained on the likelihood of the steered model's samples, by TRL's SFTTrainer.

It is the baseline of `distill`: the same texts, start, rank and optimizer, but it sees one sampled token where the
divergence sees the whole distribution.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PrinterCallback
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import require_library
from compile_steer.common.progress import Advance
from compile_steer.lower.job import Job
from compile_steer.lower.optimise import Factors, adamw
from compile_steer.lower.train import Batches
from compile_steer.models.load import quiet
from compile_steer.models.tokens import Encoded
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch


def require_trl() -> None:
    """Raise `RecipeError` before any work where TRL is not installed."""
    require_library("trl", "trl", "compile.distill.objective 'likelihood'", "Or choose another objective.")


def train(job: Job, texts: Sequence[Encoded], start: WeightPatch, advance: Advance) -> WeightPatch:
    """Return the trained patch, or `start` where its KL on the held-out batches is not lower."""
    options = job.options.distill
    parts = Batches.of(job, texts, start, options.batch_tokens)
    before = parts.whole.mean_kl(parts.held_out, start)
    wrapped = _wrapped(job, start)
    factors = {name: _factors(wrapped, name) for name in start.low_rank}
    losses = _fit(job, wrapped, factors, parts.texts)
    trained = WeightPatch({name: LowRank(B.detach().cpu(), A.detach().cpu()) for name, (B, A) in factors.items()})
    advance(options.epochs * len(texts))
    after = parts.whole.mean_kl(parts.held_out, trained)
    job.curves["distill"] = {"loss": losses, "held_out_kl": [before, after]}
    return trained if after < before else start


def _wrapped(job: Job, start: WeightPatch) -> PeftModel:
    """A copy of the model with `start` as a trainable LoRA in it; a trainer leaves marks on the model that it is given."""
    modules = [job.loaded.layout.model.get_submodule(name) for name in start.low_rank]
    config = LoraConfig(
        r=start.max_rank,
        lora_alpha=start.max_rank,
        target_modules=sorted(start.low_rank),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(copy.deepcopy(job.loaded.model), config)
    with torch.no_grad():
        for name, edit in start.low_rank.items():
            full = edit.padded(start.max_rank)
            for parameter, value in zip(_factors(wrapped, name), (full.B, full.A), strict=True):
                parameter.copy_(value)
    return wrapped


def _factors(wrapped: PeftModel, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    module: Any = wrapped.get_submodule(f"base_model.model.{name}")
    return module.lora_B["default"].weight, module.lora_A["default"].weight


def _fit(job: Job, wrapped: PeftModel, factors: Factors, texts: Sequence[Encoded]) -> list[float]:
    """Train in place on the responses alone; returns the loss of every step."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = job.options.distill
    mean = sum(len(text.ids) for text in texts) / len(texts)
    rows = [
        {
            "input_ids": list(text.ids),
            "completion_mask": [0] * text.n_prompt + [1] * (len(text.ids) - text.n_prompt),
        }
        for text in texts
    ]
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = SFTConfig(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=max(1, round(options.batch_tokens / mean)),
            gradient_accumulation_steps=options.accumulate,
            gradient_checkpointing=options.recompute_every == 1,
            bf16=options.precision == "bfloat16",
            use_cpu=job.loaded.device.type == "cpu",
            completion_only_loss=True,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=job.seed,
        )
        trainer = SFTTrainer(
            wrapped,
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=job.loaded.tokenizer,
            optimizers=(adamw(factors, options.learning_rate), None),
        )
        trainer.remove_callback(PrinterCallback)  # the losses are returned, not printed
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
