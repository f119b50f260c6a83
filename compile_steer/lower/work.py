"""What a backend has done so far, on disk, so that a run that was stopped goes on and ends in the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compile_steer.artifacts.tensors import read_tensors, save_tensors
from compile_steer.common.errors import ArtifactError

# The losses of a training, step by step, and its held-out measure before and after.
Curve = dict[str, list[float]]


@dataclass(frozen=True)
class Work:
    """Named states in `folder`; without one nothing is kept. What was kept for other `inputs` is not found again."""

    folder: Path | None = None
    inputs: str = ""

    def keep(self, name: str, tensors: Mapping[str, Tensor], state: Any) -> None:
        """Replace what is kept under `name`; `state` is JSON."""
        if self.folder is not None:
            whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
            header = json.dumps({"inputs": self.inputs, "state": state})
            save_tensors(self.folder / f"{name}.safetensors", whole, {"work": header})

    def kept(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """(tensors, state) kept under `name` for these inputs, or None: also where the file is damaged."""
        if self.folder is None:
            return None
        try:
            tensors, metadata = read_tensors(self.folder / f"{name}.safetensors")
            header = json.loads(metadata["work"])
        except (ArtifactError, KeyError, ValueError):
            return None
        return (tensors, header["state"]) if header["inputs"] == self.inputs else None

    def clear(self) -> None:
        """Forget everything: the work is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # another run's work may lie there
                self.folder.parent.rmdir()


NOWHERE = Work()
