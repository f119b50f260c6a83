"""safetensors files: one file read or written whole, a model folder read one tensor at a time.

Importing this module does not import torch; reading or writing tensors does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from compile_steer.artifacts.files import new_file
from compile_steer.common.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    with new_file(path) as temporary:
        save_file(dict(tensors), str(temporary), metadata=dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as (tensors, metadata); raises `ArtifactError` if it cannot be one."""
    with _opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, read without its tensors; raises `ArtifactError` as `read_tensors` does."""
    with _opened(path, "np") as file:  # "np": only tensors need torch
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist.")
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged or not a safetensors file ({error}). Make it again.") from error


class Checkpoint:
    """The tensors of `folder` by name, however they are spread over files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The file of each tensor; raises `ArtifactError` where there is none, or one is damaged."""
        files: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="np") as content:
                    files.update(dict.fromkeys(content.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{file} is damaged ({error}). Get or make it again.") from error
        if not files:
            raise ArtifactError(f"{self.folder} holds no .safetensors weights; only safetensors are read.")
        return files

    def tensor(self, name: str) -> Tensor | None:
        """One tensor as it was saved, or None where the folder has none of that name."""
        if name not in self.files:  # a tied head is not saved
            return None
        with safe_open(self.files[name], framework="pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor
