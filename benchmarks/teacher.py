"""One copy of the weights or two: forward KL by `distill`, and by TRL's trainer with a separate teacher model.

    python -m benchmarks.teacher

Each arm is a process of its own, so that its peak memory is its own: the same texts of the steered model, the same
low-rank edits (r 8, every Linear from the steered block on), the same batches and epochs. TRL's trainer is on-policy;
its generation is replaced by the texts, so that both are timed on the training alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.ocean import ROOT, committed_program, machine, ocean
from compile_steer.artifacts.files import save_text
from compile_steer.common.progress import Progress
from compile_steer.lowering import distill
from compile_steer.lowering.lowering import Lowering
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


def _job(folder: str) -> Lowering:
    run = ocean(SETTINGS, Path(folder), Progress())
    return Lowering(
        committed_program(run), run.model, run.data.calibration, run.recipe.compile, run.recipe.seed, run.progress
    )


def _timed(texts: Sequence[Encoded], work: Callable[[], object]) -> Cost:
    loaded, started = _memory(), time.perf_counter()
    work()
    return Cost(time.perf_counter() - started, sum(len(text.ids) for text in texts), loaded, _memory())


def ours(job: Lowering, texts: Sequence[Encoded]) -> Cost:
    """`distill` from LoRA's own start."""
    start = distill.random_patch(job.loaded.layout, job.program.first_layer, 8, 0)
    return _timed(texts, lambda: distill.train_end_to_end(job, texts, start, lambda _done: None))


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


def theirs(job: Lowering, texts: Sequence[Encoded], recompute: bool = False) -> Cost:
    """TRL's trainer: a student that wears a LoRA, and a second model with the hooks on."""
    # Here alone, so that the other arm's memory is not theirs.
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class FixedTexts(DistillationTrainer):  # type: ignore[misc]
        """Its generation replaced by the texts."""

        def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return _collated([texts[row["row"]] for row in generation_batch])

    teacher = AutoModelForCausalLM.from_pretrained(job.loaded.source, dtype=torch.float32)
    layout = job.loaded.layout
    with tempfile.TemporaryDirectory() as folder, steered(teacher, job.program):
        trainer = FixedTexts(
            job.loaded.model,
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
            processing_class=job.loaded.tokenizer,
            peft_config=LoraConfig(
                r=8,
                lora_alpha=8,
                target_modules=[n for k in range(job.program.first_layer, layout.n_layers) for n in layout.linears(k)],
                task_type="CAUSAL_LM",
            ),
        )
        return _timed(texts, trainer.train)


ARMS: dict[str, Callable[[Lowering, Sequence[Encoded]], Cost]] = {
    "ours": ours,
    "theirs": theirs,
    "theirs, recomputing": partial(theirs, recompute=True),
}


def measure(texts: Path, arm: str) -> Cost:
    """Run one arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.teacher", arm, str(texts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def compare() -> list[str]:
    """The lines of the table."""
    with tempfile.TemporaryDirectory() as folder:
        job = _job(folder)
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps([vars(one) for one in job.regression_texts]))
        one, two, three = (measure(path, arm) for arm in ARMS)
    return [
        "| forward KL, r 8 from LoRA's own start | tokens/s | peak memory, MiB | model(s) and texts alone |",
        "|---|---|---|---|",
        f"| `distill`: one copy of the weights | {one.speed:.0f} | {one.peak:.0f} | {one.loaded:.0f} |",
        f"| TRL's trainer, a separate teacher | {two.speed:.0f} | {two.peak:.0f} | {two.loaded:.0f} |",
        f"| the same, every block recomputed | {three.speed:.0f} | {three.peak:.0f} | {three.loaded:.0f} |",
        f"| ratio of the first two (targets: at least 1.7, at most 0.6) | {one.speed / two.speed:.2f} | {one.peak / two.peak:.2f} | |",
    ]


def main() -> None:
    """One arm, or the comparison."""
    if len(sys.argv) == 1:
        page = [
            "# One copy of the weights, or two",
            "",
            "Written by `make bench`; do not edit.",
            "",
            f"{machine()} SmolLM2-135M-Instruct, the committed ocean program, {EPOCHS} epochs, batches of {ROWS} texts (TRL) or 1,024 "
            "tokens. `distill` computes every second block again for the gradient (its default). Each arm is a process of its own; all "
            "see the same texts, and TRL's trainer has its generation replaced by them.",
            "",
            *compare(),
            "",
        ]
        save_text(ROOT / "docs" / "TEACHER.md", "\n".join(page))
        print("\n".join(page))
        return
    texts = [Encoded.from_json(one) for one in json.loads(Path(sys.argv[2]).read_text())]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(vars(ARMS[sys.argv[1]](_job(folder), texts))))


if __name__ == "__main__":
    main()
