"""Features of sparse autoencoders, from real small files of SAELens and of Neuronpedia."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compile_steer.common.errors import ArtifactError
from compile_steer.data.behaviour import Behaviour
from compile_steer.extraction.options import ExtractOptions
from compile_steer.models.text import Text
from compile_steer.steering.directions import Directions
from compile_steer.steering.sites import Site
from tests.helpers.extraction import extract_with
from tests.helpers.tiny import HIDDEN, LAYERS, loaded

ROWS, INDEX = 17, 7
DATA = Behaviour((), (), (), (Text("w8 w9", "w10 w11"), Text("w12", "w13")), (), (), {})


def rows(width: int = HIDDEN) -> Tensor:
    return 0.6 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(4))


def saelens(folder: Path, hook: str = "blocks.2.hook_resid_post", *, old: bool = False, width: int = HIDDEN) -> Path:
    """A folder as SAELens writes it, before and from version 6 on."""
    folder.mkdir(exist_ok=True)
    about = {"model_name": "tiny", "hook_name": hook, "hook_head_index": None, "prepend_bos": True}
    own = {"architecture": "standard", "d_in": width, "d_sae": ROWS, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps({**own, **about} if old else {**own, "metadata": about}))
    decoder = rows(width)
    tensors = {"W_enc": decoder.T.contiguous(), "b_enc": torch.ones(ROWS), "W_dec": decoder, "b_dec": torch.ones(width)}
    save_file(tensors, str(folder / "sae_weights.safetensors"))
    return folder


def neuronpedia(path: Path, **changes: Any) -> Path:
    """A feature as Neuronpedia's API gives it."""
    content = {
        "modelId": "tiny",
        "layer": "2-res",
        "index": str(INDEX),
        "hasVector": True,
        "vector": rows()[INDEX].tolist(),
        "hookName": "blocks.2.hook_resid_post",
        "vectorDefaultSteerStrength": 10,
        "maxActApprox": 31.4,
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def imported(file: Path, index: int | None = INDEX, **options: object) -> Directions:
    return extract_with(loaded("llama"), DATA, method="imported", imported={"file": file, "index": index}, **options)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.2.hook_resid_post", Site(2)),
        ("blocks.2.hook_resid_pre", Site(1)),
        ("blocks.0.hook_resid_pre", Site(0, "resid_pre")),
        ("blocks.3.hook_mlp_out", Site(3, "mlp_out")),
        ("blocks.1.hook_attn_out", Site(1, "attn_out")),
    ],
)
def test_the_decoder_row_is_the_direction_of_the_block_that_the_config_names(
    tmp_path: Path, hook: str, site: Site, old: bool
) -> None:
    directions = imported(saelens(tmp_path / "sae", hook, old=old))
    assert directions.point == site.point
    assert directions.layers == (site.layer,)
    assert torch.equal(directions.vectors[site.layer], rows()[INDEX])
    assert directions.program(site.layer, 1.7, "all").interventions[0].site == site


def test_the_controls_are_other_rows_of_the_same_length(tmp_path: Path) -> None:
    directions = imported(saelens(tmp_path / "sae"), shuffled=ROWS - 1)
    assert directions.controls == "from other rows of its file"
    units = torch.nn.functional.normalize(rows(), dim=-1)
    controls = directions.shuffled[:, 2]
    assert torch.allclose(controls.norm(dim=-1), rows()[INDEX].norm().expand(ROWS - 1), rtol=1e-5)
    taken = (torch.nn.functional.normalize(controls, dim=-1) @ units.T).argmax(dim=-1).tolist()
    assert sorted(taken) == [n for n in range(ROWS) if n != INDEX]
    assert float(directions.shuffled[:, [0, 1, 3]].abs().max()) == 0.0


def test_a_feature_of_neuronpedia_is_the_same_direction(tmp_path: Path) -> None:
    directions = imported(neuronpedia(tmp_path / "feature.json"), None)
    assert torch.allclose(directions.vectors[2], rows()[INDEX])
    assert torch.allclose(directions.shuffled[:, 2].sort(dim=-1).values, rows()[INDEX].sort().values.expand(12, HIDDEN))
    assert not torch.equal(directions.shuffled[0, 2], rows()[INDEX])


def test_a_feature_can_be_as_long_as_the_stream_so_that_a_coefficient_is_a_share(tmp_path: Path) -> None:
    own, stream = (imported(saelens(tmp_path / "sae"), length=length) for length in ("own", "stream"))
    assert stream.layers == (2,)
    assert float(stream.vectors[2].norm()) > 1.5 * float(own.vectors[2].norm())
    assert float(torch.nn.functional.cosine_similarity(stream.vectors[2], own.vectors[2], dim=0)) > 0.9999


def test_another_file_at_the_same_path_is_another_source(tmp_path: Path) -> None:
    path = neuronpedia(tmp_path / "feature.json")
    options = ExtractOptions.model_validate({"method": "imported", "imported": {"file": path.name}})
    before = options.imported_sha256(tmp_path)
    neuronpedia(path, vector=rows()[0].tolist())
    assert options.imported_sha256(tmp_path) not in ("", before)
    assert ExtractOptions().imported_sha256(tmp_path) == ""


@pytest.mark.parametrize(
    ("hook", "width", "index", "message"),
    [
        ("blocks.2.hook_resid_post", HIDDEN + 3, INDEX, r"shape \[35\]; the model is 32 wide"),
        (f"blocks.{LAYERS}.hook_resid_post", HIDDEN, INDEX, "of blocks 4 too; the model has 4"),
        ("blocks.2.attn.hook_z", HIDDEN, INDEX, "feature is of 'blocks.2.attn.hook_z'; needed: blocks.K.hook_NAME"),
        ("blocks.2.hook_resid_post", HIDDEN, ROWS, r"has 17 rows, .* \(--index; found 17\) and 12 others"),
        ("blocks.2.hook_resid_post", HIDDEN, None, r"has 17 rows, .* \(--index; found None\) and 12 others"),
    ],
)
def test_a_dictionary_that_does_not_fit_is_refused(
    tmp_path: Path, hook: str, width: int, index: int | None, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        imported(saelens(tmp_path / "sae", hook, width=width), index)


def test_files_that_hold_no_feature_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "feature.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        imported(path, None)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="is damaged.*Needed"):
        imported(path, None)
    with pytest.raises(ArtifactError, match="read as neuronpedia, which does not take extract.imported.index"):
        imported(neuronpedia(path))
    for changes, message in (
        ({"vector": [], "hasVector": False}, "holds no vector"),
        ({"vector": ["a"] * HIDDEN}, "vector.0: found 'a'; input should be a valid number"),
        ({"vector": [0.0] * HIDDEN}, "every vector is 0"),
        ({"hookName": None}, "the feature is of 'None'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            imported(neuronpedia(path, **changes), None)
    path.write_text("[1]")
    with pytest.raises(ArtifactError, match="found list, needed: a JSON object.*a feature's JSON"):
        imported(path, None)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "sae")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    with pytest.raises(ArtifactError, match=r"sae_weights\.pt is a pickle.*If you trust it, convert it"):
        imported(folder)
    (folder / "sae_weights.pt").unlink()
    with pytest.raises(ArtifactError, match=r"has no sae_weights\.safetensors"):
        imported(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="is damaged or not a safetensors file"):
        imported(folder)
