"""What every table is about: the ocean recipe on the embedded model, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from compile_steer.common.progress import Progress
from compile_steer.models.forward import run_blocks
from compile_steer.models.tokens import batches, encode
from compile_steer.pipeline.run import Run
from compile_steer.recipe import read_recipe
from compile_steer.steering.hooks import PAD
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Program

ROOT = Path(__file__).resolve().parents[1]


def ocean(settings: Sequence[str], out: Path, progress: Progress) -> Run:
    """The ocean recipe, with `settings` in place of its own."""
    return opened("ocean", settings, out, progress)


def opened(name: str, settings: Sequence[str], out: Path, progress: Progress) -> Run:
    """A recipe of this repository, with `settings` in place of its own."""
    return Run.open(read_recipe(ROOT / "recipes" / f"{name}.yaml", settings), out, progress)


def committed_program(run: Run) -> Program:
    """The validated ocean program of this repository, canonical."""
    program = Program.load(ROOT / "vectors" / "ocean.safetensors")
    run.model.layout.require_program(program, run.model.id, run.model.revision)
    return canonical(program)


def stream(run: Run, layer: int, count: int) -> torch.Tensor:
    """The base's residual stream after block `layer` on neutral text, [n_tokens, d_model], without each text's
    first token, whose norm is a hundred times the others' in many models."""
    loaded, found = run.model, []
    encoded = [encode(loaded.tokenizer, text) for text in run.data.neutral[:count]]
    for batch in batches(loaded, encoded):
        with torch.no_grad():
            hidden = run_blocks(loaded.model, batch.input_ids, batch.attention_mask, stop=layer + 1)
        real = batch.roles != PAD
        first = real & (real.cumsum(dim=1) == 1)
        found.append(hidden[real & ~first].float().cpu())
    return torch.cat(found)


def machine() -> str:
    """One sentence: date, processor, cores, torch, precision."""
    return f"{date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32, one seed."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
