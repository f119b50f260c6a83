"""The main line in Python, on a tiny model: values in, values out, and nothing written but where a folder is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_steer as cs
from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import ArtifactError, CannotLower, RecipeError
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from tests.helpers import tiny
from tests.helpers.small_run import SETTINGS, words

SCORE = SETTINGS["validate"]["score"]
VALIDATE: dict[str, Any] = {
    "layers": [1],
    "coefficients": [2.5],
    "few_shot": 0,
    "dose_prompts": 2,
    "max_new_tokens": 4,
    "max_perplexity_ratio": 1e9,
    "max_repetition": 0.99,
}
VERIFY: dict[str, Any] = {"long": 0, "capability": 2, "max_new_tokens": 4, "free_tokens": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    tiny.build("llama", seed=3).save_pretrained(folder)
    tiny.chat_tokenizer().save_pretrained(folder)
    return cs.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def data() -> cs.Behaviour:
    pairs = cs.Pairs.from_list(
        (words(n, 4), words(n + 500, 6, start=70), words(n + 900, 6, stop=79)) for n in range(40)
    )
    neutral = [Text(words(n + 50, 4), words(n + 80, 6)) for n in range(8)]
    prompts = [words(n + 2000, 4) for n in range(32)]
    return pairs.to_behaviour(neutral=neutral, heldout=prompts[:8], calibration=prompts[8:])


@pytest.fixture(scope="module")
def validation(model: LoadedModel, data: cs.Behaviour) -> Any:
    directions = cs.extract(model, data, shuffled=5)
    return cs.validate(model, data, directions, SCORE, **VALIDATE)


def test_the_main_line_ends_in_a_verified_adapter_and_writes_nothing_else(
    model: LoadedModel, data: cs.Behaviour, validation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = validation.program
    assert isinstance(program, cs.Program) and validation.report.coefficient == 2.5
    compiled = cs.compile(model, program, data.calibration, backend="closed_form")
    assert "closed_form" in repr(compiled) and not list(tmp_path.iterdir())
    folder = compiled.save("adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert Provenance.read_unedited(folder).program_sha256 == program.sha256
    parity = cs.verify(model, program, folder, data, SCORE, **VERIFY)
    assert parity.form == "adapter" and 0 <= parity.divergence.kl_remaining.value < 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert not (folder / "parity.json").exists()


def test_an_exact_compile_merges_into_what_the_hooks_compute(
    model: LoadedModel, data: cs.Behaviour, validation: Any, tmp_path: Path
) -> None:
    compiled = cs.compile(model, validation.program, [])
    assert compiled.backend == "bias"
    folder = cs.merge(compiled, tmp_path / "merged", precision="fp32")
    parity = cs.verify(model, validation.program, folder, data, SCORE, **VERIFY)
    assert parity.exact and parity.divergence.kl.value < 1e-6
    ids = torch.tensor([[7, 9, 11]])
    with torch.no_grad():
        with cs.steered(model, validation.program):
            hooks = model.model(ids).logits
        with compiled.applied():
            patched = model.model(ids).logits
    assert torch.allclose(hooks, patched, atol=1e-5) and not torch.allclose(hooks, model.model(ids).logits, atol=1e-2)


def test_a_program_file_stands_for_the_program(
    model: LoadedModel, data: cs.Behaviour, validation: Any, tmp_path: Path
) -> None:
    path, folder = tmp_path / "program.safetensors", tmp_path / "merged"
    validation.program.save(path)
    cs.merge(cs.compile(model, validation.program, [], backend="bias"), folder, precision="fp32")
    assert cs.verify(model, path, folder, data, SCORE, **VERIFY).exact
    with pytest.raises(ArtifactError, match="compiled from another program"):
        cs.verify(model, validation.program.scaled(1.5), folder, data, SCORE, **VERIFY)


def test_options_that_do_not_exist_are_refused_with_every_problem(model: LoadedModel, data: cs.Behaviour) -> None:
    with pytest.raises(RecipeError) as caught:
        cs.extract(model, data, methid="pca", pairs=1)
    assert len(caught.value.problems) == 2 and "methid" in str(caught.value)
    with pytest.raises(RecipeError, match="score"):
        cs.validate(model, data, cs.extract(model, data, shuffled=5), {"kind": "keyword"})
    with pytest.raises(CannotLower, match="orthogonalise"):
        program = cs.Program((tiny.intervention("add", layer=1),), model.id, model.revision)
        cs.compile(model, program, [], backend="orthogonalise")
    with pytest.raises(RecipeError, match="precision 'int3' is unknown; use fp32, bf16, fp16"):
        cs.merge(cs.compile(model, program, []), "nowhere", precision="int3")


def test_a_folder_of_somebody_else_is_never_replaced(model: LoadedModel, validation: Any, tmp_path: Path) -> None:
    compiled = cs.compile(model, validation.program, [])
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for write in (compiled.save, lambda folder: cs.merge(compiled, folder, precision="fp32")):
        for taken in (precious, precious / "thesis.txt"):
            with pytest.raises(ArtifactError, match="is there already and is no artifact of compile_steer"):
                write(taken)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert compiled.save(compiled.save(tmp_path / "own")) == tmp_path / "own"


def test_a_program_that_was_loaded_is_the_one_of_its_file(validation: Any, tmp_path: Path) -> None:
    path = tmp_path / "program.safetensors"
    validation.program.save(path, {"origin": {"recipe": "with more in its header"}})
    program = cs.Program.load(str(path))
    assert program.sha256 == sha256(path) != validation.program.sha256
    assert program.scaled(2.0).scaled(0.5).sha256 == validation.program.sha256


def test_wrong_values_are_refused_with_what_was_needed(model: LoadedModel, data: cs.Behaviour, validation: Any) -> None:
    pairs = cs.Pairs.from_list([("a", "b", "c")])
    with pytest.raises(RecipeError, match=r"found Pairs; needed: Behaviour, which Pairs\.to_behaviour\(\) returns"):
        cs.extract(model, pairs)  # type: ignore[arg-type]  # a wrong type on purpose
    with pytest.raises(RecipeError, match="backend 'closedform' is unknown; use auto, bias"):
        cs.compile(model, validation.program, [], backend="closedform")
    with pytest.raises(RecipeError, match="needed: a list of prompts"):
        cs.compile(model, validation.program, "one prompt", backend="closed_form")
    with pytest.raises(ArtifactError, match="positions 'everywhere'"):
        cs.extract(model, data, positions="everywhere")
    with pytest.raises(RecipeError, match="data.test has 1 pairs; needed: 2 or more"):
        cs.validate(model, replace(data, test=data.test[:1]), cs.extract(model, data, shuffled=5), SCORE, **VALIDATE)
    assert repr(data) == "Behaviour(24 train, 8 validation, 8 test, 8 neutral, 8 heldout, 24 calibration)"
