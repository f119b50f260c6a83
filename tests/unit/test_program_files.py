"""Programs on disk: what is saved comes back, and what is damaged is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from tests.helpers.tiny import HIDDEN, intervention, program, revision, vector
from tests.unit.test_program import same, three

# -------------------------------------------------------------------------------------------- disk


def test_a_program_comes_back_from_disk_bit_by_bit(tmp_path: Path) -> None:
    expected = three().toggled(2, False).scaled(1 / 3)
    expected.save(tmp_path / "a.safetensors", {"recipe_sha256": "abc"})
    assert same(Program.load(tmp_path / "a.safetensors"), expected)


def test_the_same_program_gives_the_same_file_so_that_hashes_of_hashes_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    contents = set()
    for _ in range(12):
        three().save(path, {"recipe_sha256": "abc"})
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_an_empty_program_comes_back_empty(tmp_path: Path) -> None:
    program("llama").save(tmp_path / "a.safetensors")
    assert same(Program.load(tmp_path / "a.safetensors"), program("llama"))


def test_vectors_that_share_memory_are_saved_too(tmp_path: Path) -> None:
    rows = torch.stack([vector(1), vector(2)])
    views = program("llama", *(Intervention(Site(n), "add", rows[n], 1.7) for n in range(2)))
    views.save(tmp_path / "views.safetensors")
    assert same(Program.load(tmp_path / "views.safetensors"), views)
    doubled = program("llama", intervention(seed=1)) + program("llama", intervention(seed=2))
    doubled = doubled + doubled.scaled(-0.5)
    doubled.save(tmp_path / "doubled.safetensors")
    assert same(Program.load(tmp_path / "doubled.safetensors"), doubled)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.safetensors does not exist"):
        Program.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    three().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged or not a safetensors file"):
        Program.load(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("not tensors at all, but long enough for a header", encoding="utf-8")
    with pytest.raises(ArtifactError, match="damaged or not a safetensors file"):
        Program.load(path)
    save_file({"weight": torch.ones(3)}, str(path))
    with pytest.raises(ArtifactError, match="no .program. in its metadata"):
        Program.load(path)


def rewritten(path: Path, **changes: Any) -> Path:
    """Save a good program of one intervention, then change its header or the intervention's entry."""
    entry = {
        "layer": 2,
        "point": "mlp_out",
        "operation": "add",
        "coefficient": 1.7,
        "positions": "all",
        "projection": None,
        "enabled": True,
        "tensor": "intervention.0",
    }
    header: dict[str, Any] = {"model": "tiny-llama", "revision": revision("llama"), "interventions": [entry]}
    tensors = {"intervention.0": changes.pop("tensors", vector(0))}
    for name, value in changes.items():
        place = header if name in header else entry
        if value is KeyError:
            del place[name]
        else:
            place[name] = value
    save_file(tensors, str(path), metadata={"program": json.dumps(header)})
    return path


def test_the_unchanged_rewritten_file_is_good(tmp_path: Path) -> None:
    expected = program("llama", intervention("add", "mlp_out", 2))
    assert same(Program.load(rewritten(tmp_path / "a.safetensors")), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": "two"}, "metadata is damaged"),
        ({"layer": KeyError}, "metadata is damaged"),
        ({"model": KeyError}, "metadata is damaged"),
        ({"interventions": KeyError}, "metadata is damaged"),
        ({"interventions": 3}, "metadata is damaged"),
        ({"interventions": ["x"]}, "metadata is damaged"),
        ({"interventions": None}, "metadata is damaged"),
        ({"tensor": "intervention.9"}, "tensor 'intervention.9' is named by the program but not in the file"),
        ({"point": "resid_mid"}, "interventions.0.point: found 'resid_mid'"),
        ({"layer": -2}, "layer -2 is negative"),
        ({"operation": "rotate"}, "interventions.0.operation: found 'rotate'"),
        ({"positions": "everywhere"}, "positions 'everywhere'"),
        ({"coefficient": math.nan}, "NaN and Infinity are no JSON"),
        ({"tensors": torch.full((HIDDEN,), math.nan)}, "NaN or infinity"),
        ({"tensors": torch.ones(2, HIDDEN)}, r"shape \[2, 32\]"),
    ],
)
def test_a_damaged_header_or_tensor_is_refused_with_the_file_s_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = rewritten(tmp_path / "a.safetensors", **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        Program.load(path)
    assert all(str(path) in problem for problem in caught.value.problems)


def test_metadata_that_is_no_json_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, str(tmp_path / "a.safetensors"), metadata={"program": "{"})
    with pytest.raises(ArtifactError, match="metadata is damaged"):
        Program.load(tmp_path / "a.safetensors")
