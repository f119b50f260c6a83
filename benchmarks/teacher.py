"""One copy of the weights or two: forward KL by `distill`, and by TRL's trainer with a separate teacher model.

    python -m benchmarks.teacher

Each trainer is a process of its own, so that its peak memory is its own: the same texts of the steered model, the same
low-rank edits (r 8, every Linear from the steered block on), the same batches and epochs. TRL's trainer is on-policy;
its generation is replaced by the texts, so that both are timed on the training alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.ocean import committed_program, lowering_of, ocean
from benchmarks.record import ROOT, Record, prose, table, timed
from compile_steer.common.progress import Progress
from compile_steer.lowering import distill
from compile_steer.lowering.job import Lowering
from compile_steer.models.tokens import Encoded
from compile_steer.steering.hooks import steered

SETTINGS = [
    "compile.calibration.prompts=48",
    "compile.calibration.max_new_tokens=96",
    "compile.distill.start=random",
    "compile.distill.epochs=3",
    "compile.distill.batch_tokens=1024",
]
ROWS, EPOCHS = 8, 3


@dataclass(frozen=True)
class Cost:
    """Seconds of training, tokens trained on a pass, and the peak of the process's memory before and after, MiB."""

    seconds: float
    tokens: int
    loaded: float
    peak: float

    @property
    def speed(self) -> float:
        return EPOCHS * self.tokens / self.seconds


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def lowering_in(folder: Path) -> Lowering:
    """What both train: the committed program with the texts of its recipe."""
    run = ocean(SETTINGS, folder, Progress())
    return lowering_of(run, committed_program(run))


def cost(texts: Sequence[Encoded], work: Callable[[], object]) -> Cost:
    """Train, and measure."""
    loaded = _memory()
    _, seconds = timed(work)
    return Cost(seconds, sum(len(text.ids) for text in texts), loaded, _memory())


def ours(lowering: Lowering, texts: Sequence[Encoded]) -> Cost:
    """`distill` from LoRA's own start."""
    start = distill.random_patch(lowering.loaded.layout, lowering.program.first_layer, 8, 0)
    return cost(texts, lambda: distill.train_end_to_end(lowering, texts, start, lambda _done: None))


def _collated(chosen: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """A batch as TRL's trainer lays it out: prompts padded on the left, completions on the right."""
    parts: dict[str, torch.Tensor] = {}
    for name, side in (("prompt", "left"), ("completion", "right")):
        ids = [torch.tensor(t.ids[: t.n_prompt] if name == "prompt" else t.ids[t.n_prompt :]) for t in chosen]
        ones = [torch.ones_like(one) for one in ids]
        for what, rows in (("ids", ids), ("mask", ones)):
            parts[f"{name}_{what}"] = pad_sequence(rows, batch_first=True, padding_side=side)
    parts["num_items_in_batch"] = parts["completion_mask"].sum()
    return parts


def theirs(lowering: Lowering, texts: Sequence[Encoded], recompute: bool = False) -> Cost:
    """TRL's trainer: a student that wears a LoRA, and a second model with the hooks on."""
    # Here alone, so that the other trainer's memory is not theirs.
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class FixedTexts(DistillationTrainer):  # type: ignore[misc]  # trl has no types
        """Its generation replaced by the texts."""

        def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return _collated([texts[row["row"]] for row in generation_batch])

    teacher = AutoModelForCausalLM.from_pretrained(lowering.loaded.source, dtype=torch.float32)
    layout = lowering.loaded.layout
    with tempfile.TemporaryDirectory() as folder, steered(teacher, lowering.program):
        trainer = FixedTexts(
            lowering.loaded.model,
            teacher,
            DistillationConfig(
                output_dir=folder,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=ROWS,
                learning_rate=5e-4,
                beta=0.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=recompute,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "", "row": n} for n in range(len(texts))]),
            processing_class=lowering.loaded.tokenizer,
            peft_config=LoraConfig(
                r=8,
                lora_alpha=8,
                target_modules=[
                    n for k in range(lowering.program.first_layer, layout.n_layers) for n in layout.linears(k)
                ],
                task_type="CAUSAL_LM",
            ),
        )
        return cost(texts, trainer.train)


TRAINERS: dict[str, Callable[[Lowering, Sequence[Encoded]], Cost]] = {
    "`distill`: one copy of the weights": ours,
    "TRL's trainer, a separate teacher": theirs,
    "the same, every block recomputed": partial(theirs, recompute=True),
}
RECORD = Record[None](
    "TEACHER",
    "One copy of the weights, or two",
    "make bench",
    prose("teacher: setting", epochs=EPOCHS, rows=ROWS),
)


def report(costs: Sequence[Cost]) -> list[str]:
    """The table, from the costs of the trainers in turn."""
    rows: list[Sequence[object]] = [
        (name, f"{one.speed:.0f}", f"{one.peak:.0f}", f"{one.loaded:.0f}")
        for name, one in zip(TRAINERS, costs, strict=True)
    ]
    speed, peak = costs[0].speed / costs[1].speed, costs[0].peak / costs[1].peak
    rows.append(("ratio of the first two (targets: at least 1.7, at most 0.6)", f"{speed:.2f}", f"{peak:.2f}", ""))
    return table("forward KL, r 8 from LoRA's own start | tokens/s | peak memory, MiB | model(s) and texts alone", rows)


def compare(folder: Path) -> list[Cost]:
    """Write the texts once, and run every trainer on them in a process of its own."""
    texts, costs = folder / "texts.json", []
    texts.write_text(json.dumps([vars(one) for one in lowering_in(folder).regression_texts]))
    for name in TRAINERS:
        command = [sys.executable, "-m", "benchmarks.teacher", name, str(texts)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        costs.append(Cost(**json.loads(done.stdout.splitlines()[-1])))
    return costs


def main() -> None:
    """One trainer on the texts of a file, or the comparison."""
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) == 1:
            print(RECORD.save(*report(compare(Path(folder)))))
        else:
            texts = [Encoded.from_json(one) for one in json.loads(Path(sys.argv[2]).read_text())]
            print(json.dumps(vars(TRAINERS[sys.argv[1]](lowering_in(Path(folder)), texts))))


if __name__ == "__main__":
    main()
