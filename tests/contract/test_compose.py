"""Several programs at once: adapters that are stacked or compiled jointly, what they leave, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compile_steer.artifacts.files import read_json, sha256, without_check
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.export.merged import merged_model
from compile_steer.lowering import exact
from compile_steer.models.libraries import quiet
from compile_steer.models.load import LoadedModel
from compile_steer.models.reload import reload_adapters, set_adapter_scales
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Program
from compile_steer.tools.compose import CompositionRun, compose
from compile_steer.tools.describe import describe_artifact
from compile_steer.tools.interference import CO_LOADED, JOINT, STACKED
from compile_steer.tools.lineage import lineage
from tests.contract.test_adapters import origin
from tests.helpers.composition import NAMES, CompositionCase, co_loaded, write_recipe
from tests.helpers.tiny import Padded, intervention, logits, program, random_patch, relative_error, texts

Save = Callable[[str], LoadedModel]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_stacked_adapter_equals_all_adapters_co_loaded(family: str, saved: Save, tmp_path: Path) -> None:
    one, scales = saved(family), (0.7, -1.3, 0.4)
    patches = [random_patch(one, ranks=ranks, seed=seed) for seed, ranks in enumerate(((2, 3), (1, 1), (5, 2)))]
    folders = []
    for n, patch in enumerate(patches):
        folders.append(tmp_path / f"{n}")
        write_patch(folders[-1], patch, one, origin(one), "")
    stacked = WeightPatch()
    for folder, scale in zip(folders, scales, strict=True):
        stacked += scale * read_patch(folder)
    write_patch(tmp_path / "stacked", stacked, one, origin(one), "")
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32)
        ours = PeftModel.from_pretrained(plain, str(tmp_path / "stacked")).eval()
    theirs = co_loaded(one, folders, scales)
    named = {f"member{n}": folder for n, folder in enumerate(folders)}
    switched = reload_adapters(named, one)
    set_adapter_scales(switched, {name: scale for name, scale in zip(named, scales, strict=True)})
    for side in ("left", "right"):
        inputs = Padded.of(texts(), side)
        with with_patch(one.model, sum((d * p for d, p in zip(scales, patches, strict=True)), WeightPatch())):
            expected = logits(one.model, inputs)
        assert relative_error(expected, logits(one.model, inputs)) > 1e-2
        for model in (ours, theirs, switched.model):
            assert relative_error(logits(model, inputs), expected) < 1e-5
    set_adapter_scales(switched, {"member1": 1.0})
    with with_patch(one.model, patches[1]):
        assert relative_error(logits(switched.model, inputs), logits(one.model, inputs)) < 1e-5


def test_biases_of_several_programs_add_up_to_the_hooks_of_all(saved: Save) -> None:
    one = saved("llama")
    programs = [
        program("llama", intervention(layer=1), intervention("add", "attn_out", 3, seed=2)),
        program("llama", intervention(layer=1, seed=1, coefficient=-0.9)),
    ]
    scales = (0.6, 1.4)
    patch, both = WeightPatch(), program("llama")
    for scale, steering in zip(scales, programs, strict=True):
        patch += scale * exact.bias_patch(canonical(steering), one.layout)
        both += scale * steering
    inputs = Padded.of(texts(), "right")
    with steered(one.model, both, roles=inputs.roles):
        expected = logits(one.model, inputs)
    assert relative_error(logits(merged_model(one.source, patch).eval(), inputs), expected) < 1e-5


def test_compose_leaves_two_adapters_with_lineage_and_the_measured_interference(
    case: CompositionCase, two: tuple[Path, Path]
) -> None:
    scales = ["--scale", "1", "--scale", "0.5", "--device", "cpu"]
    command = ["compose", *map(str, two), "--runs", str(case.runs), *scales]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code in (0, 1), result.output
    composition = json.loads(result.stdout)
    paths = RunPaths(case.runs / "+".join(NAMES), "+".join(NAMES))
    assert without_check(read_json(paths.composed("closed_form.json"), "")) == composition
    assert (result.exit_code == 0) == composition["passed"]
    assert [row["behaviour"] for row in composition["matrix"]] == list(NAMES)
    columns = [f"{kind} {name}" for kind in ("hooks", "adapter") for name in NAMES]
    assert set(composition["matrix"][0]["effects"]) == {*columns, "hooks all", CO_LOADED, STACKED, JOINT}
    assert [fit["scales"] for fit in composition["settings"]] == [[1, 0.5], [1, 0], [0, 0.5], [0.5, 0.5], [1, 0.25]]
    for fit in composition["settings"]:
        assert fit["kl"] < 0.2 * fit["kl_base"], "each adapter follows its own scale"
    assert composition["stacked_from_loaded"] < 1e-9
    for way in (STACKED, JOINT):
        came = Provenance.read(paths.composed(f"closed_form-{way}"))
        assert came.program_sha256 == sha256(paths.program)
        adapter = RunPaths(case.runs / NAMES[1], NAMES[1]).adapter("closed_form")
        assert came.members[f"{NAMES[1]} x 0.5"] == artifact_sha256(adapter)
        links = {link.name: link for link in lineage(paths.composed(f"closed_form-{way}"))}
        assert links[f"member {NAMES[1]} x 0.5"].state == links[f"{NAMES[1]}: files"].state == "intact"
    assert [i.coefficient for i in Program.load(paths.program).interventions] == [0.4, -0.25]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == result.exit_code
    for expected in ("hooks high.tide", "adapters: all minus the sum", "joint minus hooks", "1, 0.25", "interference"):
        assert expected in shown.output
    assert describe_artifact(paths.composed("closed_form.json"))["kind"] == "composition"
    card = (paths.composed("closed_form-joint") / "README.md").read_text(encoding="utf-8")
    assert f"| made of | {NAMES[1]} x 0.5, SHA-256" in card


def test_a_joint_compile_is_kept_while_nothing_changes(case: CompositionCase, two: tuple[Path, Path]) -> None:
    run = case.open(*two)
    compose(run)
    paths = run.paths
    first = {way: paths.composed(f"closed_form-{way}").stat().st_ino for way in (STACKED, JOINT)}
    compose(run)
    assert {way: paths.composed(f"closed_form-{way}").stat().st_ino for way in (STACKED, JOINT)} == first
    compose(case.open(*two, scales=(1, 0.9)))
    assert all(paths.composed(f"closed_form-{way}").stat().st_ino != first[way] for way in (STACKED, JOINT))


def test_every_problem_is_reported_at_once(case: CompositionCase) -> None:
    steering = case.program(intervention())
    patch = random_patch(case.base)
    elsewhere = Program(steering.interventions, "another/model", "hub:1")
    recipes = [
        case.run("fine", steering, patch),
        case.run("no-adapter", steering, None),
        case.run("foreign", elsewhere, patch, model="another/model", revision="hub:1"),
        case.run("stale", steering, patch),
        case.run("shift", steering, WeightPatch(bias={"model.layers.1.mlp.down_proj": torch.ones(32)}), form="patch"),
        write_recipe(case.root, "no-run", case.base.source, 0),
    ]
    stale = RunPaths(case.runs / "stale", "stale")
    (2.0 * steering).save(stale.program)
    with pytest.raises(ArtifactError) as raised:
        case.open(*recipes, scales=(1.0, 0.0))
    message = "\n".join(raised.value.problems)
    for expected in (
        "2 scales for 6 recipes",
        "a scale of 0 is no program",
        r"no-adapter-closed_form does not exist. Make it with: compile-steer compile",
        "fine and foreign: the program was made for 'another/model', revision hub:1",
        "stale-closed_form was compiled from another program",
        "shift: ",
        "is no PEFT adapter (closed_form makes a merged checkpoint)",
        "no-run.safetensors does not exist. Make it with 'compile-steer validate'",
    ):
        assert expected in message


def test_one_recipe_equal_names_other_models_and_unknown_backends_are_refused(
    case: CompositionCase, two: tuple[Path, Path]
) -> None:
    with pytest.raises(ArtifactError, match="found 1 recipe; needed: two or more"):
        case.open(two[0])
    with pytest.raises(ArtifactError, match="2 recipes have the name 'high.tide'"):
        case.open(two[0], two[0])
    with pytest.raises(ArtifactError, match="backend 'magic' is unknown; use one of bias"):
        case.open(*two, backend="magic")
    other: Recipe = read_recipe(two[1]).model_copy(update={"model": "other"})
    with pytest.raises(ArtifactError, match=r"different values of 'model': .*\(high\.tide\), 'other' \(still\)"):
        CompositionRun.open([read_recipe(two[0]), other], (), "closed_form", case.runs, case.root, Progress())


def test_an_adapter_that_is_not_ours_is_refused(case: CompositionCase, two: tuple[Path, Path]) -> None:
    adapter = RunPaths(case.runs / NAMES[0], NAMES[0]).adapter("closed_form")
    (adapter / "compile_steer.json").unlink()
    with pytest.raises(ArtifactError, match="it was not made by compile_steer"):
        case.open(*two)
