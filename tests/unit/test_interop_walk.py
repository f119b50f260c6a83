"""Imported vectors steer as the tool that made them, go on as if they were ours, and programs go out again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf as gguf_library
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from compile_steer.artifacts.paths import RunPaths
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CannotLower, CompileSteerError, RecipeError
from compile_steer.formats.foreign import ImportOptions, read_vectors
from compile_steer.recipe import read_recipe
from compile_steer.steering.directions import EVERY_BLOCK, Directions
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Intervention, Program
from compile_steer.steering.sites import Site
from compile_steer.tools.lineage import lineage
from compile_steer.tools.vector_files import block_vectors, write_gguf, write_svec
from tests.helpers.captures import blocks_of
from tests.helpers.composition import write_recipe
from tests.helpers.extraction import extract_with
from tests.helpers.foreign_files import by_block, gguf, rows, svec, tensor
from tests.helpers.tiny import (
    HIDDEN,
    LAYERS,
    Padded,
    chat_tokenizer,
    intervention,
    loaded,
    logits,
    program,
    relative_error,
    saved,
    texts,
    vector,
)
from tests.unit.test_feature_formats import DATA

FAMILIES = ("llama", "gpt2", "gemma2")


def imported(family: str, file: Path, **said: Any) -> Directions:
    return extract_with(loaded(family), DATA, method="imported", imported={"file": file, **said}, shuffled=5)


def by_hand(family: str, vectors: dict[int, Tensor], coefficient: float) -> Tensor:
    """Logits with `coefficient` times each vector added to the output of its block by plain hooks of our own."""
    model, inputs = loaded(family).model, Padded.of(texts(), "left")
    handles = []
    for layer, value in vectors.items():

        def shift(_module: Any, _args: Any, output: Any, v: Tensor = value) -> Any:
            moved = (output[0] if isinstance(output, tuple) else output) + coefficient * v
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handles.append(blocks_of(family, model)[layer].register_forward_hook(shift))
    try:
        return logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def hooked(family: str, steering: Program) -> Tensor:
    inputs = Padded.of(texts(), "left")
    with steered(loaded(family).model, steering, roles=inputs.roles):
        return logits(loaded(family).model, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hooked_logits_are_those_of_the_vectors_added_by_hand(tmp_path: Path, family: str) -> None:
    vectors = by_block(1, 2)
    states = rows(LAYERS + 1)
    files = [
        (gguf(tmp_path / "a.gguf", vectors), {"layer_convention": "block"}, vectors),
        (
            gguf(tmp_path / "a.gguf", vectors),
            {"layer_convention": "hidden_state"},
            {k - 1: v for k, v in vectors.items()},
        ),
        (svec(tmp_path / "a.svec", vectors), {"layer_convention": "block"}, vectors),
        (tensor(tmp_path / "vec_layer_2_m.pt", vectors[2]), {}, {2: vectors[2]}),
        (tensor(tmp_path / "x_response_avg_diff.pt", states), {}, {k: states[k + 1] for k in range(LAYERS)}),
    ]
    plain = by_hand(family, {}, 1.7)
    for path, said, wanted in files:
        one = imported(family, path, **said)
        assert one.layers == tuple(sorted(wanted))
        for layer in one.layers:
            found, expected = (
                hooked(family, one.program(layer, 1.7, "all")),
                by_hand(family, {layer: wanted[layer]}, 1.7),
            )
            assert relative_error(found, expected) < 1e-5
            assert relative_error(plain, expected) > 0.01
        joint = imported(family, path, **said, joint=list(one.layers))
        assert (
            relative_error(hooked(family, joint.program(EVERY_BLOCK, 1.7, "all")), by_hand(family, wanted, 1.7)) < 1e-5
        )


def test_the_controls_are_as_long_as_the_vectors_at_each_block(tmp_path: Path) -> None:
    one = imported("llama", gguf(tmp_path / "a.gguf", by_block(1, 3)), layer_convention="block")
    assert tuple(one.shuffled.shape) == (5, LAYERS, HIDDEN)
    assert torch.allclose(one.shuffled.norm(dim=-1), one.vectors.norm(dim=-1).expand(5, -1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(one.shuffled[:, 1], one.vectors[1], dim=-1)
    assert float(cosine.abs().max()) < 0.9
    assert len({tuple(row.tolist()) for row in one.shuffled[:, 1]}) == 5
    one.save(tmp_path / "kept.safetensors")
    assert Directions.load(tmp_path / "kept.safetensors").controls == "from its own numbers in another order"


def test_vectors_that_act_at_once_are_those_that_were_named(tmp_path: Path) -> None:
    path = gguf(tmp_path / "a.gguf", by_block(0, 1, 3))
    one = imported("llama", path, layer_convention="block", joint=[1, 3])
    assert one.joint
    assert one.layers == (1, 3)
    assert [i.site for i in one.program(EVERY_BLOCK, 0.6, "all").interventions] == [Site(1), Site(3)]
    assert imported("llama", path, layer_convention="block", joint="all").layers == (0, 1, 3)
    with pytest.raises(
        ArtifactError, match=r"no vector for 2 of extract\.imported\.joint.* has one for blocks 0, 1, 3"
    ):
        imported("llama", path, layer_convention="block", joint=[1, 2])
    with pytest.raises(ArtifactError, match="has a vector for the embeddings too"):
        imported("llama", path, layer_convention="hidden_state", joint="all")


# ------------------------------------------------------------------------------------------------ and out again


def given(**said: Any) -> ImportOptions:
    return ImportOptions(LAYERS, HIDDEN, 3, torch.Generator(), **said)


def several() -> Program:
    """Adds at two blocks, of odd numbers that fp32 holds and decimal notation does not."""
    parts = [Intervention(Site(k), "add", vector(k, 0.1 + k / 3), 1.0) for k in (1, 3)]
    return program("llama", *parts)


def test_what_goes_out_comes_back_bit_for_bit(tmp_path: Path) -> None:
    wanted = {i.site.layer: i.vector for i in several().interventions}
    write_gguf(tmp_path / "a.gguf", several(), "llama")
    write_svec(tmp_path / "a.svec", several(), "llama", "block", LAYERS)
    for name in ("a.gguf", "a.svec"):
        back = read_vectors(tmp_path / name, None, given(layer_convention="block"))
        assert back.made_for == "llama"
        assert back.vectors.keys() == wanted.keys()
        assert all(torch.equal(back.vectors[k], v) for k, v in wanted.items())
    earlier = program("llama", intervention(layer=2))
    write_svec(tmp_path / "b.svec", earlier, "llama", "hidden_state", LAYERS)
    assert list(json.loads((tmp_path / "b.svec").read_text())["directions"]) == ["3"]
    back = read_vectors(tmp_path / "b.svec", None, given(layer_convention="hidden_state"))
    assert torch.equal(back.vectors[2], 1.7 * vector(0))


def test_a_control_vector_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    told = write_gguf(path, several(), "llama")
    file = gguf_library.GGUFReader(path)
    contents = {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")}
    assert contents == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in file.tensors] == [
        ("direction.1", "F32", [HIDDEN]),
        ("direction.3", "F32", [HIDDEN]),
    ]
    assert len(told) == 1
    assert (
        "llama.cpp refuses a file with direction.0" in write_gguf(path, program("llama", intervention(layer=0)), "x")[1]
    )


def test_shifts_are_the_programs_coefficients_times_its_vectors() -> None:
    moved = program(
        "llama",
        intervention(layer=2, seed=1, coefficient=-0.4),
        intervention("add", "resid_pre", 3, seed=2),
        Intervention(Site(1), "add", vector(3), 0.0),
    )
    found = block_vectors(moved)
    assert found.keys() == {2}
    assert torch.allclose(found[2], -0.4 * vector(1) + 1.7 * vector(2))


@pytest.mark.parametrize(
    "write", [write_gguf, partial(write_svec, convention="block", n_layers=LAYERS)], ids=["gguf", "svec"]
)
def test_a_program_that_a_vector_file_cannot_hold_is_refused_with_every_reason(
    tmp_path: Path, write: Callable[[Path, Program, str], object]
) -> None:
    path = tmp_path / "a.gguf"
    steering = program(
        "llama",
        intervention("ablate"),
        intervention("clamp", "mlp_out", 2, positions="last_prompt+response"),
        intervention(layer=3),
        intervention("add", "resid_pre", 0, positions="response"),
    )
    with pytest.raises(CannotLower) as caught:
        write(path, steering, "llama")
    reasons = [re.search(r"cannot hold (.*);", problem) for problem in caught.value.problems]
    assert [found[1] for found in reasons if found] == [
        "operation ablate, only add",
        "operation clamp, only add",
        "point mlp_out, only resid_post",
        "positions last_prompt+response, only all",
        "point resid_pre, only resid_post",
        "positions response, only all",
    ]
    with pytest.raises(CannotLower, match="adds nothing"):
        write(path, 0.0 * several(), "llama")
    assert not path.exists()


def test_the_last_block_is_no_block_s_input(tmp_path: Path) -> None:
    with pytest.raises(CannotLower, match="block 3, the last, is the input of no block"):
        write_svec(tmp_path / "a.svec", several(), "llama", "hidden_state", LAYERS)


# --------------------------------------------------------------------------------------------- the command line


def run(*command: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, command), "--json"])
    if isinstance(done.exception, CompileSteerError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_file_becomes_a_recipe_and_the_program_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "model"
    saved("llama", source)
    chat_tokenizer().save_pretrained(source)
    base = write_recipe(tmp_path, "high.tide", str(source), 0)
    base.write_text(f"# Where it comes from\n{base.read_text()}")
    vectors = by_block(1, 2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "happy.gguf").symlink_to(gguf(tmp_path / "0a1b2c", vectors))  # as a hub's cache has it
    command = ["import", base, "--from", "theirs/happy.gguf", "--to", "happy", "--device", "cpu"]
    with pytest.raises(ArtifactError, match=r"direction\.1 to direction\.2 for 'tiny'"):
        run(*command)
    assert not (tmp_path / "happy.yaml").exists()
    found = run(*command, "--layer-convention", "block", "--joint", "1,2")
    assert found["recipe"] == str(tmp_path / "happy.yaml")
    made = read_recipe(tmp_path / "happy.yaml")
    assert (made.name, made.device, str(made.extract.imported.file)) == ("happy", "cpu", "theirs/happy.gguf")
    assert (tmp_path / "happy.yaml").read_text().startswith("# Where it comes from\n")
    paths = RunPaths(tmp_path / "runs" / "happy", "happy")
    directions = Directions.load(paths.directions)
    assert directions.joint
    assert torch.equal(directions.vectors[1], vectors[1])
    assert {link.name: link.state for link in lineage(paths.directions)}["data imported"] == "intact"
    first = paths.directions.stat().st_ino
    run("extract", tmp_path / "happy.yaml")
    assert paths.directions.stat().st_ino == first, "the new recipe keeps what the import left"
    run(*command, "--layer-convention", "block", "--joint", "1,2")
    with pytest.raises(RecipeError, match="is there already and says something else"):
        run(*command, "--layer-convention", "hidden_state")
    with pytest.raises(RecipeError, match=r"validate\.layers: 3 without a direction; there is one for 1, 2"):
        run(*command[:-3], "fresh", "--layer-convention", "block", "--set", "validate.layers=[2, 3]", "--device", "cpu")
    assert not (tmp_path / "fresh.yaml").exists()
    with pytest.raises(RecipeError, match="--joint 1;2: needed: all, or blocks"):
        run(*command, "--layer-convention", "block", "--joint", "1;2")

    directions.program(EVERY_BLOCK, 0.6, "all").save(paths.program)
    told = run("export-vector", tmp_path / "happy.yaml")
    assert told["file"] == str(paths.program.with_suffix(".gguf").relative_to(tmp_path))
    back = read_vectors(Path(told["file"]), None, given(layer_convention="block"))
    assert all(torch.equal(back.vectors[k], 0.6 * v) for k, v in vectors.items())
    run("export-vector", tmp_path / "happy.yaml", "--format", "svec", "--layer-convention", "block", "--to", "b.svec")
    assert torch.equal(read_vectors(Path("b.svec"), None, given(layer_convention="block")).vectors[2], 0.6 * vectors[2])
    for wrong in (["--format", "pt"], ["--format", "svec"], ["--layer-convention", "block"]):
        with pytest.raises(RecipeError, match="needed: gguf without a convention"):
            run("export-vector", tmp_path / "happy.yaml", *wrong)
