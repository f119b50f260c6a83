"""Other tools' vector files that are wrong, of every format: damaged, of another model, with numbers that are none."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.campaign.case import Bad, Case
from benchmarks.campaign.edits import HEADERS, SPOILS
from tests.helpers.foreign_files import gguf, repsteer, svec, tensor
from tests.helpers.tiny import HIDDEN, LAYERS, vector

Make = Callable[[Path, Tensor, int], Path]


def _safetensors(folder: Path, value: Tensor, layer: int) -> Path:
    save_file({f"resid_post.{layer}": value}, folder / "v.safetensors")
    return folder / "v.safetensors"


def _saelens(folder: Path, value: Tensor, layer: int) -> Path:
    save_file({"W_dec": torch.stack([value] * 20)}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"hook_name": f"blocks.{layer}.hook_resid_post"}))
    return folder


def _neuronpedia(folder: Path, value: Tensor, layer: int) -> Path:
    (folder / "v.json").write_text(
        json.dumps({"vector": value.tolist(), "hookName": f"blocks.{layer}.hook_resid_post"})
    )
    return folder / "v.json"


# How a file is made of a vector and a block, what the recipe says of it, and which file is spoilt.
FORMATS: dict[str, tuple[Make, dict[str, Any], str]] = {
    "gguf": (lambda folder, v, k: gguf(folder / "v.gguf", {k: v}), {"layer_convention": "block"}, "v.gguf"),
    "svec": (lambda folder, v, k: svec(folder / "v.svec", {k: v}), {"layer_convention": "block"}, "v.svec"),
    "safetensors": (_safetensors, {}, "v.safetensors"),
    "caa": (lambda folder, v, _: tensor(folder / "v.pt", v), {"format": "caa", "layer": 1}, "v.pt"),
    "persona": (lambda folder, v, _: tensor(folder / "v.pt", torch.stack([v] * (LAYERS + 1))), {"format": "persona"}, "v.pt"),
    "hidden_directions": (
        lambda folder, v, _: tensor(folder / "v.pt", torch.stack([v] * LAYERS)), {"format": "hidden_directions"}, "v.pt"
    ),
    "axbench": (lambda folder, v, _: tensor(folder / "v.pt", torch.stack([v] * 20)), {"format": "axbench", "layer": 1, "index": 2}, "v.pt"),
    "saelens": (_saelens, {"index": 2}, "sae_weights.safetensors"),
    "neuronpedia": (_neuronpedia, {}, "v.json"),
    "repsteer": (lambda folder, v, k: repsteer(folder / "v", v, k), {}, "tensors.safetensors"),
}  # fmt: skip
VALUES: dict[str, Tensor] = {
    "NaN": torch.full((HIDDEN,), float("nan")),
    "infinity": torch.full((HIDDEN,), float("inf")),
    "zeros": torch.zeros(HIDDEN),
    "another width": torch.ones(HIDDEN + 1),
    "half the width": torch.ones(HIDDEN // 2),
    "no width": torch.ones(0),
}
BLOCKS = ("gguf", "svec", "safetensors", "saelens", "neuronpedia", "repsteer")  # formats that say their block


def _imported(make: Callable[[Path], Path], settings: dict[str, Any], case: Case) -> None:
    folder = case.root / "recipes" / "vector"
    folder.mkdir()
    file = make(folder).relative_to(case.root / "recipes")
    case.set(extract={"method": "imported", "imported": {"file": str(file), **settings}})


def _spoilt(make: Make, file: str, spoil: Callable[[Path], object], folder: Path) -> Path:
    path = make(folder, vector(1), 1)
    spoil(next(folder.rglob(file)))
    return path


def _write(name: str, content: str | bytes, folder: Path) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def _save(value: Any, folder: Path) -> Path:
    return tensor(folder / "v.pt", value)


class _Code:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, ("open('canary', 'w').close()",)


def _gguf_head(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little") + rest


CAA = {"format": "caa", "layer": 1}
BLOCK = {"layer_convention": "block"}
SVEC = '{"model_type": "llama", "directions": {%s}}'
ONES = json.dumps([1.0] * HIDDEN)
HAND: dict[str, tuple[Callable[[Path], Path], dict[str, Any], tuple[str, ...]]] = {
    "a pickle of code": (partial(_write, "v.pkl", pickle.dumps(_Code())), {}, ("v.pkl",)),
    "a pickle of code named .pt": (partial(_write, "v.pt", pickle.dumps(_Code())), CAA, ("v.pt",)),
    "torch.save of code": (partial(_save, {"v": _Code()}), CAA, ("v.pt",)),
    "HDF5": (partial(_write, "v.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), {}, ("v.h5",)),
    "2 TB of one number": (partial(_save, torch.zeros(1, dtype=torch.float16).expand(10**12)), CAA, ("v.pt",)),
    "4 GB of one number": (partial(_save, torch.ones(1, dtype=torch.float16).expand(2 * 10**9)), CAA, ("v.pt",)),
    "rows of 20 GB of one number": (
        partial(_save, torch.ones(1).expand(LAYERS, 10**9)), {"format": "hidden_directions"}, ("v.pt",),
    ),
    "integers": (partial(_save, torch.ones(HIDDEN).long()), CAA, ("v.pt",)),
    "complex numbers": (partial(_save, torch.ones(HIDDEN, dtype=torch.complex64)), CAA, ("v.pt",)),
    "a sparse tensor": (partial(_save, torch.ones(HIDDEN).to_sparse()), CAA, ("v.pt",)),
    "a dictionary": (partial(_save, {1: torch.ones(HIDDEN)}), CAA, ("v.pt",)),
    "a list": (partial(_save, [torch.ones(HIDDEN)]), CAA, ("v.pt",)),
    "a scalar": (partial(_save, torch.tensor(1.0)), CAA, ("v.pt",)),
    "a tensor without storage": (partial(_save, torch.ones(HIDDEN, device="meta")), CAA, ("v.pt",)),
    "an index beyond": (partial(_save, torch.ones(20, HIDDEN)), {"format": "axbench", "layer": 1, "index": 20}, ("v.pt",)),
    "a negative index": (partial(_save, torch.ones(20, HIDDEN)), {"format": "axbench", "layer": 1, "index": -1}, ("index",)),
    "a layer beyond": (partial(_save, torch.ones(HIDDEN)), {"format": "caa", "layer": LAYERS}, ("v.pt",)),
    "no convention": (partial(_write, "v.svec", SVEC % f'"1": {ONES}'), {}, ("layer_convention",)),
    "a format that does not fit": (partial(_write, "v.svec", SVEC % f'"1": {ONES}'), {"format": "gguf", **BLOCK}, ("v.svec",)),
    "a file that is missing": (lambda folder: folder / "gone.gguf", BLOCK, ("gone.gguf",)),
    "svec with a key twice": (partial(_write, "v.svec", SVEC % f'"1": {ONES}, "1": {ONES.replace("1", "2")}'), BLOCK, ("v.svec",)),
    "svec with block 01": (partial(_write, "v.svec", SVEC % f'"01": {ONES}'), BLOCK, ("v.svec",)),
    "svec with one NaN": (partial(_write, "v.svec", SVEC % f'"1": {ONES.replace("1.0", "NaN", 1)}'), BLOCK, ("v.svec",)),
    "svec of texts": (partial(_write, "v.svec", SVEC % '"1": ["1.0"]'), BLOCK, ("v.svec",)),
    "svec of 10^400": (partial(_write, "v.svec", SVEC % f'"1": [1{"0" * 400}]'), BLOCK, ("v.svec",)),
    "svec of 5,000 digits": (partial(_write, "v.svec", SVEC % f'"1": [{"9" * 5000}]'), BLOCK, ("v.svec",)),
    "svec of brackets": (partial(_write, "v.svec", "[" * 100_000), BLOCK, ("v.svec",)),
    "svec of UTF-16": (partial(_write, "v.svec", (SVEC % f'"1": {ONES}').encode("utf-16")), BLOCK, ("v.svec",)),
    "gguf of 2^60 tensors": (partial(_write, "v.gguf", _gguf_head(2**60, 0)), BLOCK, ("v.gguf",)),
    "gguf of 2^60 keys": (partial(_write, "v.gguf", _gguf_head(0, 2**60)), BLOCK, ("v.gguf",)),
    "gguf with a text of 2^62 bytes": (partial(_write, "v.gguf", _gguf_head(0, 1, bytes(7) + b"\x40x")), BLOCK, ("v.gguf",)),
    "gguf of a model": (lambda folder: gguf(folder / "v.gguf", {1: vector(1)}, "llama"), BLOCK, ("v.gguf",)),
    "gguf of version 99": (partial(_write, "v.gguf", b"GGUF" + (99).to_bytes(4, "little") + bytes(64)), BLOCK, ("v.gguf",)),
}  # fmt: skip


def inputs() -> Iterator[Bad]:
    """Every format with every value and spoilt in every way; lying headers; by hand."""
    for kind, (make, settings, file) in FORMATS.items():
        for name, value in VALUES.items():
            edit = partial(_imported, partial(_made, make, value, 1), settings)
            yield Bad(f"vector: {kind} of {name}", edit, ("vector",))
        for name, spoil in SPOILS.items():
            edit = partial(_imported, partial(_spoilt, make, file, spoil), settings)
            yield Bad(f"vector: {kind} that is {name}", edit, ("vector",))
        for block in (LAYERS, 99_999) if kind in BLOCKS else ():
            edit = partial(_imported, partial(_made, make, vector(1), block), settings)
            yield Bad(f"vector: {kind} of block {block}", edit, ("vector", str(block)))
    for name, content in HEADERS.items():
        edit = partial(_imported, partial(_write, "v.safetensors", content), {})
        yield Bad(f"vector: safetensors with {name}", edit, ("v.safetensors",))
    for name, (make_file, settings, words) in HAND.items():
        yield Bad(f"vector: {name}", partial(_imported, make_file, settings), words)


def _made(make: Make, value: Tensor, layer: int, folder: Path) -> Path:
    return make(folder, value, layer)
