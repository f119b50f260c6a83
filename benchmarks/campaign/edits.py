"""Edits of a case's files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
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


def remove(*paths: Path) -> None:
    """Delete files."""
    for path in paths:
        path.unlink()


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


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 135000000\n"
# What stands where a file should: a download that failed, a copy that stopped.
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"{",
    "a text": b"Not Found\n",
    "a page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "a pointer of Git LFS": LFS_POINTER,
    "zeros": bytes(4096),
}
# Every way in which a file is not what it should be.
SPOILS: dict[str, Callable[[Path], object]] = {
    **{name: partial(Path.write_bytes, data=content) for name, content in CONTENTS.items()},
    **{f"cut at {share:.1%}": partial(cut, share=share) for share in (0.1, 0.5, 0.99)},
}


def safetensors_bytes(header: str | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file by hand; `size` is what it claims as its header's length."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def claims(shape: list[int], end: int, dtype: str = "F32") -> str:
    """The header of one tensor, `resid_post.1`, that ends at byte `end` of the data."""
    return json.dumps({"resid_post.1": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})


# Safetensors files whose headers lie.
HEADERS: dict[str, bytes] = {
    "header of 2^60 bytes": safetensors_bytes("{}", size=2**60),
    "header of 2^64 - 1 bytes": safetensors_bytes("{}", size=2**64 - 1),
    "header of 90 MB": safetensors_bytes("{" + " " * 90_000_000 + "}"),
    "header that is no JSON": safetensors_bytes("{resid_post.1}"),
    "header of brackets": safetensors_bytes("[" * 50_000),
    "header of Latin-1": safetensors_bytes(b'{"caf\xe9": 1}'),
    "shape of 4 TB": safetensors_bytes(claims([10**12], 4 * 10**12)),
    "shape beyond 64 bits": safetensors_bytes(claims([2**62, 2**62], 128), bytes(128)),
    "shape and bytes that differ": safetensors_bytes(claims([32], 64), bytes(64)),
    "bytes beyond the end": safetensors_bytes(claims([32], 128), bytes(64)),
    "bytes after the end": safetensors_bytes(claims([32], 128), bytes(256)),
    "negative offset": safetensors_bytes(claims([32], -128), bytes(128)),
    "unknown type": safetensors_bytes(claims([32], 128, "F31"), bytes(128)),
    "name twice": safetensors_bytes(f"{claims([32], 128)[:-1]},{claims([32], 128)[1:]}", bytes(128)),
}
