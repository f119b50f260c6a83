"""Models on disk to be audited, and the audit of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.progress import Progress
from compile_steer.export.merged import merged_model
from compile_steer.models.load import LoadedModel, load
from compile_steer.steering.patch import WeightPatch
from compile_steer.steering.program import Program
from compile_steer.tools.audit import Audit, audit
from tests.helpers.tiny import build, chat_tokenizer

DOWN = "model.layers.1.mlp.down_proj"


def on_disk(family: str, folder: Path, **changes: Any) -> LoadedModel:
    build(family, **changes).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return load(str(folder), device="cpu")


def merged(base: LoadedModel, patch: WeightPatch, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    merged_model(base.source, patch).to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def look(base: LoadedModel, other: Path, program: Program | None = None, threshold: float = 0.01) -> Audit:
    report = audit(base.source, str(other), program, threshold, Progress())
    json.dumps(asdict(report), allow_nan=False)
    return report


def rewritten(base: LoadedModel, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the base with some tensors changed."""
    shutil.copytree(base.source, folder)
    tensors = load_file(str(folder / "model.safetensors"))
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))
    return folder
