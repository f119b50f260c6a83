"""Vector files that are refused: other shapes, damage, other content, and pickles, of which nothing is run."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import Format
from tests.helpers.foreign_files import by_block, gguf, read_tiny, rows, same_vectors, svec, tensor
from tests.helpers.tiny import HIDDEN, LAYERS, vector


def test_every_file_of_another_width_depth_or_with_nan_is_refused_with_all_reasons(tmp_path: Path) -> None:
    wide, deep = torch.ones(HIDDEN + 1), vector(1)
    broken = vector(2)
    broken[3] = torch.nan
    files: list[tuple[Path, dict[str, Any]]] = [
        (gguf(tmp_path / "a.gguf", {1: wide, LAYERS: deep, 2: broken}), {"layer_convention": "block"}),
    ]
    with pytest.raises(ArtifactError, match="line 1, column .*: NaN and Infinity are no JSON"):
        read_tiny(svec(tmp_path / "a.svec", {1: wide, LAYERS: deep, 2: broken}), layer_convention="block")
    save_file(
        {"resid_post.1": wide, f"resid_post.{LAYERS}": deep, "resid_post.2": broken}, str(tmp_path / "a.safetensors")
    )
    files.append((tmp_path / "a.safetensors", {}))
    for path, options in files:
        with pytest.raises(ArtifactError) as caught:
            read_tiny(path, **options)
        text = str(caught.value)
        assert len(caught.value.problems) == 4, text
        for part in ("[33]", "the model is 32 wide", f"blocks {LAYERS} too; the model has {LAYERS}", "NaN or infinity"):
            assert part in text
    single: list[tuple[Any, Format, dict[str, Any], str]] = [
        (wide, "caa", {"layer": 1}, r"shape \[33\]; the model is 32 wide"),
        (deep, "caa", {"layer": LAYERS}, "of blocks 4 too; the model has 4"),
        (broken, "caa", {"layer": 1}, "holds NaN or infinity"),
        (torch.zeros(HIDDEN), "caa", {"layer": 1}, "every vector is 0"),
        (
            rows(),
            "caa",
            {"layer": 1},
            r"this format needs \[d_model\]\. .*hidden_directions for \[4, 32\], persona for \[5, 32\]",
        ),
        (rows(LAYERS), "persona", {}, r"shape \[4, 32\]; this format needs \[5, d_model\]"),
        (rows(LAYERS + 1), "hidden_directions", {}, r"shape \[5, 32\]; this format needs \[4, d_model\]"),
        (deep, "axbench", {"layer": 1, "index": 0}, r"shape \[32\]; this format needs \[n_concepts, d_model\]"),
        (rows(9), "axbench", {"index": 2}, "does not say its block"),
        (rows(9), "axbench", {"layer": 2}, "has 9 rows, counted from 0; needed are extract.imported.index"),
        (rows(3), "axbench", {"layer": 2, "index": 1}, "has 3 rows.* 3 others as controls"),
        (torch.arange(HIDDEN), "caa", {"layer": 1}, "holds: torch.strided torch.int64"),
        (deep.to_sparse(), "caa", {"layer": 1}, "holds: torch.sparse_coo torch.float32"),
        (deep.to("meta"), "caa", {"layer": 1}, "torch.float32 on meta; needed: one tensor of floats"),
        ({1: deep}, "caa", {"layer": 1}, r"holds: dict; .*safetensors file whose tensors are named resid_post\.K"),
    ]
    for value, named, options, message in single:
        with pytest.raises(ArtifactError, match=message):
            read_tiny(tensor(tmp_path / "one.pt", value), named, **options)


def test_a_gguf_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ArtifactError, match="of architecture 'llama'; needed: 'controlvector'"):
        read_tiny(gguf(path, by_block(1), "llama"), layer_convention="block")
    extra: dict[str, Any] = {
        "output.weight": (0, vector(1).numpy()),
        "direction.3": (0, np.ones((2, HIDDEN), np.float32)),
    }
    with pytest.raises(ArtifactError) as caught:
        read_tiny(gguf(path, by_block(1), **extra), layer_convention="block")
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "tensor 'output.weight'; needed: direction.K.",
        "direction.3 is F32 of shape [2, 32]; needed: F32 or F16, [d_model].",
    ]
    with pytest.raises(ArtifactError, match="holds no direction"):
        read_tiny(gguf(path, {}), layer_convention="block")


def sample(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A small content file, and the options that it needs."""
    path = folder / f"layer_2.{kind}"
    if kind in ("gguf", "svec"):
        return {"gguf": gguf, "svec": svec}[kind](path, by_block(1, 3)), {"layer_convention": "block"}
    if kind == "pt":
        return tensor(path, vector(1)), {}
    save_file({"resid_post.1": vector(1)}, str(path))
    return path, {}


@pytest.mark.parametrize("kind", ["gguf", "svec", "pt", "safetensors"])
def test_a_truncated_file_is_never_half_read(tmp_path: Path, kind: str) -> None:
    path, options = sample(tmp_path, kind)
    content = path.read_bytes()
    read_tiny(path, **options)
    for size in sorted({0, 1, 7, 20, *range(24, len(content) - 1, max(len(content) // 60, 1)), len(content) - 1}):
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match="damaged"):
            read_tiny(path, **options)


@pytest.mark.parametrize("kind", ["gguf", "svec", "pt", "safetensors"])
def test_a_file_with_changed_bytes_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    path, options = sample(tmp_path, kind)
    content = path.read_bytes()
    draw = random.Random(5)
    refused = 0
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed) if kind == "svec" else min(280, len(changed)))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            read_tiny(path, **options)
        except ArtifactError:
            refused += 1
    assert refused > 20


def test_svec_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.svec"
    for changes, message in (
        ({"directions": {}}, "directions: found {}; dictionary should have at least 1 item"),
        ({"directions": [1.0]}, r"directions: found \[1.0\]; input should be an object"),
        ({"directions": {"-1": [1.0]}}, "directions.-1.*: found '-1'; string should match pattern"),
        ({"directions": {"1": [[1.0]]}}, r"directions.1.0: found \[1.0\]; input should be a valid number"),
        ({"directions": {"1": ["1"]}}, "directions.1.0: found '1'; input should be a valid number"),
        ({"directions": {"1": [True]}}, "directions.1.0: found True; input should be a valid number"),
        ({"directions": {"1": [10**400]}}, "line 1, column .*: the number 1000.* is too large for a float"),
        ({"directions": {"9" * 5000: [1.0]}}, "string should match pattern"),
        ({"directions": {"1": [1e300] * HIDDEN}}, "NaN or infinity"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_tiny(svec(path, by_block(1), **changes), layer_convention="block")
    path.write_text("[1]")
    with pytest.raises(ArtifactError, match=r"found list, needed: a JSON object.. Needed: the \.svec"):
        read_tiny(path, layer_convention="block")


def test_what_cannot_be_told_or_is_not_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        read_tiny(tmp_path / "nowhere.gguf")
    odd = tensor(tmp_path / "odd.pt", rows())
    with pytest.raises(ArtifactError, match=r"its name does not tell the format.*gguf, svec, .*repsteer"):
        read_tiny(odd)
    with pytest.raises(ArtifactError, match=r"read as persona, which does not take extract\.imported\.layer and index"):
        read_tiny(odd, "persona", layer=1, index=2)
    with pytest.raises(ArtifactError, match=r"read as gguf, which does not take extract\.imported\.layer"):
        read_tiny(gguf(tmp_path / "a.gguf", by_block(1)), layer=1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"holds none of cfg\.json, manifest\.json"):
        read_tiny(tmp_path / "folder")
    with pytest.raises(ArtifactError, match="is a folder; a vector of format gguf is a file"):
        read_tiny(tmp_path / "folder", "gguf")
    with pytest.raises(ArtifactError, match="is a file; a vector of format saelens is a folder"):
        read_tiny(odd, "saelens", index=1)


# --------------------------------------------------------------------------------------------------- pickles


class SteeringVector:
    """The shape of steering-vectors' class, which the refusal says how to convert."""

    def __init__(self, layer_activations: dict[int, Tensor]) -> None:
        self.layer_activations = layer_activations


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize(
    "name", ["layer_2.pt", "layer_2.pth", "layer_2.bin", "vector.pkl", "vector.pickle", "vector.h5"]
)
@pytest.mark.parametrize("write", ["torch", "old torch", "pickle"])
def test_nothing_of_a_pickle_is_run(tmp_path: Path, name: str, write: str) -> None:
    path, target = tmp_path / name, tmp_path / "was-run"
    if write == "pickle":
        path.write_bytes(pickle.dumps(Malicious(target)))
    else:
        torch.save({"v": Malicious(target)}, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(
        ArtifactError, match=r"run code when.* Nothing of it was run|runs code when it is read\. Nothing"
    ):
        read_tiny(path)
    assert not target.exists()
    if path.suffix != ".h5":
        with path.open("rb") as file:
            _ = pickle.load(file) if write == "pickle" else torch.load(file, weights_only=False)
        assert target.exists(), "the file does run code where it is trusted"


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_the_conversion_in_a_refusal_works(tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("made.pt" if write == "torch" else "made.pkl")
    vectors = by_block(1, 2)
    made = SteeringVector({k: v.double() for k, v in vectors.items()})
    if write == "torch":
        torch.save(made, path)
    else:
        path.write_bytes(pickle.dumps(made))
    with pytest.raises(ArtifactError) as caught:
        read_tiny(path, "caa" if write == "torch" else None)
    lines = [line[4:] for line in str(caught.value).splitlines() if re.match(" {4}", line)]
    exec("\n".join(lines), {})
    assert load_file(str(tmp_path / "made.safetensors")).keys() == {"resid_post.1", "resid_post.2"}
    assert same_vectors(read_tiny(tmp_path / "made.safetensors"), vectors)
