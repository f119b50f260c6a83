"""Vector files as other tools write them, made byte by byte or with the tool's own library, never with our writers."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from compile_steer.formats.foreign import ForeignVectors, Format, ImportOptions, read_vectors
from tests.helpers.tiny import HIDDEN, LAYERS, vector

F32, F16 = 0, 1
_STRING, _UINT32 = 8, 4


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(tensors: Mapping[str, tuple[int, np.ndarray]], strings: Mapping[str, str]) -> bytes:
    """A GGUF file of version 3: `tensors`, name -> (type, values), and text metadata beside a layer count."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(strings) + 1)
    for key, value in strings.items():
        head += _text(key) + struct.pack("<I", _STRING) + _text(value)
    head += _text("controlvector.layer_count") + struct.pack("<II", _UINT32, len(tensors))
    data = b""
    for name, (kind, values) in tensors.items():
        dims = values.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        raw = values.tobytes()
        data += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + data


def gguf(path: Path, vectors: Mapping[int, Tensor], architecture: str = "controlvector", **tensors: Any) -> Path:
    """A control vector in F32, with `tensors` beside."""
    named = {f"direction.{k}": (F32, v.numpy()) for k, v in vectors.items()}
    strings = {"general.architecture": architecture, "controlvector.model_hint": "tiny"}
    path.write_bytes(gguf_bytes({**named, **tensors}, strings))
    return path


def svec(path: Path, vectors: Mapping[int, Tensor], **changes: Any) -> Path:
    """As IBM's library saves it."""
    content = {
        "model_type": "llama",
        "directions": {k: v.tolist() for k, v in vectors.items()},
        "explained_variances": dict.fromkeys(vectors, 0.71),
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def repsteer(folder: Path, value: Tensor, layer: int = 2, component: str = "resid_post", **changes: Any) -> Path:
    """A direction as repsteer saves it, with its checksums."""
    folder.mkdir()
    save_file({"direction": value}, str(folder / "tensors.safetensors"))
    site = {"stream": "language", "component": component, "layer": layer, "unit": None, "io": "output"}
    manifest = {
        "artifact_type": "direction",
        "model": {"id": "org/tiny", "hidden_size": HIDDEN},
        "site": site,
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sums = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("manifest.json", "tensors.safetensors")
    }
    (folder / "checksums.json").write_text(json.dumps({"algorithm": "sha256", "files": sums}))
    return folder


def tensor(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def rows(count: int = LAYERS) -> Tensor:
    """[count, d_model], no two of one length."""
    return torch.stack([vector(n, 1.3 + 0.4 * n) for n in range(count)])


def by_block(*blocks: int) -> dict[int, Tensor]:
    return {k: vector(k, 1.3 + 0.4 * k) for k in blocks}


def read_tiny(path: Path, format: Format | None = None, controls: int = 3, **options: Any) -> ForeignVectors:
    """The vectors of a file, for the tiny models."""
    generator = torch.Generator().manual_seed(5)
    return read_vectors(path, format, ImportOptions(LAYERS, HIDDEN, controls, generator, **options))


def same_vectors(foreign: ForeignVectors, expected: Mapping[int, Tensor]) -> bool:
    """Whether exactly these blocks have a vector, and each is the expected one bit by bit."""
    vectors = {layer: v for layer, v in foreign.vectors.items() if bool(v.any())}
    return vectors.keys() == expected.keys() and all(torch.equal(vectors[k], v) for k, v in expected.items())
