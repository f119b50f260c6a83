"""A model folder's tensors, read one at a time from its safetensors files: never a whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compile_steer.common.errors import ArtifactError


class Checkpoint:
    """The tensors of `folder` by name, however they are spread over files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The file of each tensor; raises `ArtifactError` where there is none, or one is damaged."""
        found: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as content:
                    found.update(dict.fromkeys(content.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{file} is damaged ({error}). Get or make it again.") from error
        if not found:
            raise ArtifactError(f"{self.folder} holds no .safetensors weights; only safetensors are read.")
        return found

    def tensor(self, name: str) -> Tensor | None:
        """One tensor as it was saved, or None where the folder has none of that name."""
        if name not in self.files:
            return None
        with safe_open(self.files[name], framework="pt") as content:
            found: Tensor = content.get_tensor(name)
        return found
