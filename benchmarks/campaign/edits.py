"""Edits of a case's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def as_folder(path: Path) -> None:
    """An empty folder where the file was."""
    path.unlink()
    path.mkdir()


def as_link(path: Path, target: str | Path) -> None:
    """A link where the file was."""
    path.unlink()
    path.symlink_to(target)


def cut(path: Path, share: float) -> None:
    """Keep only so much of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def flip(path: Path, at: float) -> None:
    """Change one byte, at a fraction of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0xFF
    path.write_bytes(content)
