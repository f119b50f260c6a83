"""CompositionRun programs at once: adapters that are stacked, loaded together or compiled jointly, held against all hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from compile_steer.artifacts.files import digest, sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance, artifact_sha256
from compile_steer.cli.app import app
from compile_steer.common.errors import ArtifactError, CompileSteerError
from compile_steer.common.progress import Progress
from compile_steer.export.adapter import read_patch, write_patch
from compile_steer.export.merged import merged_model
from compile_steer.lowering import exact
from compile_steer.lowering.closed_form import Stage
from compile_steer.models.load import LoadedModel, load, quiet
from compile_steer.models.logprobs import divergence, final_states
from compile_steer.models.reload import reload_adapters, set_adapter_scales
from compile_steer.models.text import Text
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.steering.hooks import steered
from compile_steer.steering.passes import canonical
from compile_steer.steering.patch import WeightPatch, with_patch
from compile_steer.steering.program import Intervention, Program
from compile_steer.tools.compose import CompositionRun, compose
from compile_steer.tools.interference import JOINT, LOADED, STACKED, Member, _texts, measure, summed
from compile_steer.tools.interference_report import Composition
from compile_steer.tools.lineage import describe_artifact, lineage
from tests.contract.test_adapters import origin
from tests.helpers.fitting import solve
from tests.helpers.tiny import (
    Padded,
    chat_tokenizer,
    intervention,
    logits,
    program,
    random_patch,
    relative_error,
    texts,
)

Save = Callable[[str], LoadedModel]
NAMES = ("high.tide", "still")  # PEFT takes no dot in an adapter's name
SETTINGS = {
    "compile": {"calibration": {"prompts": 24, "max_new_tokens": 8}},
    "verify": {"heldout": 8, "pairs": 8, "max_new_tokens": 8},
}


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in torch.randint(6, 97, (count,), generator=torch.Generator().manual_seed(seed)))


def write_recipe(root: Path, name: str, model: str, start: int) -> Path:
    """A recipe whose data are words; recipes with the same `start` share all of it."""
    folder = root / f"data-{start}"
    folder.mkdir(parents=True, exist_ok=True)
    for at, split in enumerate(("train", "validation", "test", "neutral", "heldout", "calibration")):
        seeds = range(start + 1000 * at, start + 1000 * at + (30 if split == "calibration" else 10))
        rows: list[dict[str, str]] = [{"prompt": words(seed, 5)} for seed in seeds]
        if split in ("train", "validation", "test"):
            rows = [
                row | {"positive": words(seed + 300, 7), "negative": words(seed + 600, 6)}
                for row, seed in zip(rows, seeds, strict=True)
            ]
        if split == "neutral":
            rows = [row | {"response": words(seed + 300, 6)} for row, seed in zip(rows, seeds, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = ("train", "validation", "test", "neutral", "heldout", "calibration")
    content = {
        "name": name,
        "model": model,
        "data": {split: f"data-{start}/{split}.jsonl" for split in splits},
        "validate": {"score": {"kind": "lowercase"}},
        **SETTINGS,
    }
    path = root / f"{name}.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return path


@dataclass
class Bench:
    """A tiny llama on disk, and recipes with runs made for it."""

    root: Path
    base: LoadedModel

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def program(self, *interventions: Intervention) -> Program:
        return Program(interventions, self.base.id, self.base.revision)

    def run(self, name: str, steering: Program, patch: WeightPatch | None, start: int = 0, **changes: Any) -> Path:
        """A recipe with its program, and its adapter if there is a patch; `changes` are the adapter's provenance's."""
        paths = RunPaths(self.runs / name, name)
        steering.save(paths.program)
        if patch is not None:
            found = replace(origin(self.base), name=name, program_sha256=sha256(paths.program), **changes)
            write_patch(paths.adapter("closed_form"), patch, self.base, found, steering.describe())
        return write_recipe(self.root, name, self.base.source, start)

    def compiled(self, name: str, steering: Program, start: int = 0) -> Path:
        stages = [Stage(one.site.layer, "mlp", 4) for one in steering.interventions]
        fit = solve(self.base, canonical(steering), stages)
        return self.run(name, steering, fit, start)

    def open(self, *recipes: Path, dials: tuple[float, ...] = (), backend: str = "closed_form") -> CompositionRun:
        read = [read_recipe(path) for path in recipes]
        return CompositionRun.open(read, dials, backend, self.runs, self.root / "out", Progress())


@pytest.fixture
def bench(saved: Save, tmp_path: Path) -> Bench:
    source = saved("llama").source
    chat_tokenizer().save_pretrained(source)
    return Bench(tmp_path, load(source, device="cpu"))


@pytest.fixture
def two(bench: Bench) -> tuple[Path, Path]:
    """Two compiled behaviours, at blocks 1 and 3, with data of their own."""
    first = bench.compiled(NAMES[0], bench.program(intervention(layer=1, coefficient=0.4)), 0)
    return first, bench.compiled(NAMES[1], bench.program(intervention(layer=3, coefficient=-0.5, seed=1)), 20_000)


# ------------------------------------------------------------------------------- stacked, loaded at once


def loaded_at_once(one: LoadedModel, folders: list[Path], dials: tuple[float, ...]) -> torch.nn.Module:
    """What a user of PEFT would write, without any code of ours."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
        for n, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"a{n}")
    model.base_model.set_adapter([f"a{n}" for n in range(len(folders))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for n, dial in enumerate(dials):
                module.set_scale(f"a{n}", dial)
    found: torch.nn.Module = model.eval()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_stacked_adapter_is_all_of_them_loaded_at_once(family: str, saved: Save, tmp_path: Path) -> None:
    one, dials = saved(family), (0.7, -1.3, 0.4)
    patches = [random_patch(one, ranks=ranks, seed=seed) for seed, ranks in enumerate(((2, 3), (1, 1), (5, 2)))]
    folders = []
    for n, patch in enumerate(patches):
        folders.append(tmp_path / f"{n}")
        write_patch(folders[-1], patch, one, origin(one), "")
    stacked = WeightPatch()
    for folder, dial in zip(folders, dials, strict=True):
        stacked += dial * read_patch(folder)
    write_patch(tmp_path / "stacked", stacked, one, origin(one), "")
    with quiet():
        plain = AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32)
        ours = PeftModel.from_pretrained(plain, str(tmp_path / "stacked")).eval()
    theirs = loaded_at_once(one, folders, dials)
    named = {f"member{n}": folder for n, folder in enumerate(folders)}
    switched = reload_adapters(named, one)
    set_adapter_scales(switched, {name: dial for name, dial in zip(named, dials, strict=True)})
    for side in ("left", "right"):
        inputs = Padded.of(texts(), side)
        with with_patch(one.model, sum((d * p for d, p in zip(dials, patches, strict=True)), WeightPatch())):
            wanted = logits(one.model, inputs)
        assert relative_error(wanted, logits(one.model, inputs)) > 1e-2
        for found in (ours, theirs, switched.model):
            assert relative_error(logits(found, inputs), wanted) < 1e-5
    set_adapter_scales(switched, {"member1": 1.0})
    with with_patch(one.model, patches[1]):
        assert relative_error(logits(switched.model, inputs), logits(one.model, inputs)) < 1e-5


def test_biases_of_several_programs_add_up_to_the_hooks_of_all(saved: Save) -> None:
    one = saved("llama")
    programs = [
        program("llama", intervention(layer=1), intervention("add", "attn_out", 3, seed=2)),
        program("llama", intervention(layer=1, seed=1, coefficient=-0.9)),
    ]
    dials = (0.6, 1.4)
    patch, both = WeightPatch(), program("llama")
    for dial, steering in zip(dials, programs, strict=True):
        patch += dial * exact.bias_patch(canonical(steering), one.layout)
        both += dial * steering
    inputs = Padded.of(texts(), "right")
    with steered(one.model, both, roles=inputs.roles):
        wanted = logits(one.model, inputs)
    assert relative_error(logits(merged_model(one.source, patch).eval(), inputs), wanted) < 1e-5


# ----------------------------------------------------------------------------------------------- the judge


def test_what_is_left_is_two_adapters_and_what_they_do(bench: Bench, two: tuple[Path, Path]) -> None:
    command = [
        "compose",
        *map(str, two),
        "--runs",
        str(bench.runs),
        "--scale",
        "1",
        "--scale",
        "0.5",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code in (0, 1), done.output
    found = json.loads(done.stdout)
    paths = RunPaths(bench.runs / "+".join(NAMES), "+".join(NAMES))
    assert json.loads(paths.composition("closed_form").read_text(encoding="utf-8")) == found
    assert (done.exit_code == 0) == found["passed"]
    assert [row["behaviour"] for row in found["matrix"]] == list(NAMES)
    columns = [f"{kind} {name}" for kind in ("hooks", "adapter") for name in NAMES]
    assert set(found["matrix"][0]["effects"]) == {*columns, "hooks all", LOADED, STACKED, JOINT}
    assert [fit["dials"] for fit in found["settings"]] == [[1, 0.5], [1, 0], [0, 0.5], [0.5, 0.5], [1, 0.25]]
    for fit in found["settings"]:
        assert fit["kl"] < 0.2 * fit["kl_base"], "each adapter follows its own dial"
    assert found["stacked_from_loaded"] < 1e-9
    for way in (STACKED, JOINT):
        came = Provenance.read(paths.composed("closed_form", way))
        assert came.program_sha256 == sha256(paths.program)
        adapter = RunPaths(bench.runs / NAMES[1], NAMES[1]).adapter("closed_form")
        assert came.members[f"{NAMES[1]} x 0.5"] == artifact_sha256(adapter)
        links = {link.name: link for link in lineage(paths.composed("closed_form", way))}
        assert links[f"member {NAMES[1]} x 0.5"].state == links[f"{NAMES[1]}: files"].state == "intact"
    assert [i.coefficient for i in Program.load(paths.program).interventions] == [0.4, -0.25]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == done.exit_code
    for wanted in ("hooks high.tide", "adapters: all less the sum", "joint less hooks", "1, 0.25", "interference"):
        assert wanted in shown.output
    assert describe_artifact(paths.composition("closed_form"))["kind"] == "composition"
    card = (paths.composed("closed_form", JOINT) / "README.md").read_text(encoding="utf-8")
    assert f"| made of | {NAMES[1]} x 0.5, SHA-256" in card


def test_adapters_loaded_at_once_are_judged_without_composing_them(bench: Bench, two: tuple[Path, Path]) -> None:
    loose = ["--set", "verify.gates.kl_remaining=0.2"]  # what two rank-4 edits on a random tiny model can be asked
    command = [
        "co-load",
        *map(str, two),
        "--runs",
        str(bench.runs),
        "--scale",
        "1",
        "--scale",
        "0.5",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, [*command, *loose, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    paths = RunPaths(bench.runs / "+".join(NAMES), "+".join(NAMES))
    assert json.loads(paths.co_loaded("closed_form").read_text(encoding="utf-8")) == found
    assert list(found["artifacts"]) == list(found["interplay"]["errors"]) == [LOADED]
    assert found["artifacts"][LOADED] == found["settings"][0] and found["stacked_from_loaded"] is None
    assert set(found["matrix"][0]["missed"]) == {LOADED}
    # What a user of PEFT does by hand, against both hooks at once, on the very texts.
    several = bench.open(*two, dials=(1, 0.5))
    both = summed(several.members, [1, 0.5])
    model = loaded_at_once(bench.base, [one.adapter for one in several.members], (1, 0.5))
    heldout = _texts(bench.base, several.members, both, Progress())
    assert digest([list(one.ids) for one in heldout]) == found["sha256"]["texts"]
    wanted = final_states(bench.base, heldout, both).response
    got = final_states(replace(bench.base, model=model), heldout).response
    by_hand = divergence(bench.base.model, wanted, bench.base.model, got).mean
    assert found["artifacts"][LOADED]["kl"] == pytest.approx(by_hand, rel=1e-4) and by_hand > 0
    # One of the two emptied: alone it is nothing, and together they are not both programs.
    adapter = several.members[1].adapter
    write_patch(adapter, 0.0 * read_patch(adapter), bench.base, Provenance.read(adapter), "")
    failed = CliRunner().invoke(app, [*command, *loose])
    assert failed.exit_code == 1 and "FAILED loaded: KL" in failed.output and "loaded at once" in failed.output


def test_a_joint_compile_is_kept_while_nothing_changes(bench: Bench, two: tuple[Path, Path]) -> None:
    several = bench.open(*two)
    compose(several)
    paths = several.paths
    first = {way: paths.composed("closed_form", way).stat().st_ino for way in (STACKED, JOINT)}
    compose(several)
    assert {way: paths.composed("closed_form", way).stat().st_ino for way in (STACKED, JOINT)} == first
    compose(bench.open(*two, dials=(1, 0.9)))
    assert all(paths.composed("closed_form", way).stat().st_ino != first[way] for way in (STACKED, JOINT))


def composed(bench: Bench, two: tuple[Path, Path], *dials: float) -> Composition:
    return compose(bench.open(*two, dials=dials))


def test_interference_of_the_programs_fades_with_the_square_of_the_dose(bench: Bench, two: tuple[Path, Path]) -> None:
    strong, weak = composed(bench, two, 2, 2), composed(bench, two, 0.02, 0.02)
    assert strong.interplay.programs > 0.05
    assert weak.interplay.programs < 0.05 * strong.interplay.programs
    for row in weak.matrix:  # far below the effects themselves
        size = max(abs(interval.value) for interval in row.effects.values())
        assert abs(row.cross["hooks"].value) < 0.05 * size


def test_a_program_and_its_negation_cancel_and_leave_no_share(bench: Bench) -> None:
    steering = bench.program(intervention(layer=1, coefficient=0.4))
    found = composed(bench, (bench.compiled("one", steering), bench.compiled("two", steering)), 1, -1)
    assert found.settings[0].share is None
    assert all(fit.share is not None for fit in found.settings[1:])
    for row in found.matrix:
        assert abs(row.effects["hooks all"].value) < 1e-6
        assert abs(row.effects[STACKED].value) < 1e-5, "the sum of an adapter and its negation is nothing"
    assert found.interplay.errors[STACKED] < 1e-5
    # Each alone is off by its own error, and those do not cancel; together they do: all of it is the cross term.
    assert found.interplay.cross == pytest.approx(found.interplay.alone, rel=1e-3)


@pytest.mark.parametrize("planted", ["one left out", "a dial ignored", "emptied"])
def test_the_judge_fails_what_is_not_the_sum(bench: Bench, two: tuple[Path, Path], planted: str) -> None:
    several = bench.open(*two, dials=(1, 2))
    compose(several)
    folder = several.paths.composed("closed_form", STACKED)
    own = [read_patch(one.adapter) for one in several.members]
    wrong = {"one left out": own[0], "a dial ignored": own[0] + own[1], "emptied": 0.0 * (own[0] + own[1])}[planted]
    write_patch(folder, wrong, bench.base, Provenance.read(folder), "")
    folders = {way: several.paths.composed("closed_form", way) for way in (STACKED, JOINT)}
    found = measure(bench.base, several.members, "closed_form", folders, Progress())
    assert not found.passed
    assert any(reason.startswith("stacked: KL") for reason in found.reasons)
    assert found.stacked_from_loaded is not None and found.stacked_from_loaded > 1e-4


def test_prompts_that_another_compile_has_seen_are_not_judged_on(bench: Bench, two: tuple[Path, Path]) -> None:
    several = bench.open(*two)
    first, second = several.members
    data = second.behaviour
    seen = replace(first.behaviour, heldout=data.calibration[:9])
    folders = {way: first.adapter for way in (STACKED, JOINT)}
    found = measure(bench.base, [replace(first, behaviour=seen), second], "closed_form", folders, Progress())
    only = measure(bench.base, [replace(first, behaviour=replace(seen, heldout=())), second], "", folders, Progress())
    assert found.sha256["texts"] == only.sha256["texts"]
    nothing: list[Member] = [
        replace(one, behaviour=replace(one.behaviour, heldout=data.calibration)) for one in several.members
    ]
    with pytest.raises(CompileSteerError, match=r"data\.heldout: every prompt is among"):
        measure(bench.base, nothing, "", folders, Progress())
    prompts = tuple(Text(pair.prompt) for pair in first.behaviour.test)
    met = replace(second, behaviour=replace(data, calibration=prompts))
    with pytest.raises(CompileSteerError, match=r"data\.test: every prompt of high\.tide is among"):
        measure(bench.base, [first, met], "", folders, Progress())


# -------------------------------------------------------------------------------------------------- refusals


def test_every_problem_is_said_at_once(bench: Bench) -> None:
    steering = bench.program(intervention())
    patch = random_patch(bench.base)
    elsewhere = Program(steering.interventions, "another/model", "hub:1")
    recipes = [
        bench.run("fine", steering, patch),
        bench.run("no-adapter", steering, None),
        bench.run("foreign", elsewhere, patch, model="another/model", revision="hub:1"),
        bench.run("stale", steering, patch),
        bench.run("shift", steering, WeightPatch(bias={"model.layers.1.mlp.down_proj": torch.ones(32)}), form="patch"),
        write_recipe(bench.root, "no-run", bench.base.source, 0),
    ]
    stale = RunPaths(bench.runs / "stale", "stale")
    (2.0 * steering).save(stale.program)
    with pytest.raises(ArtifactError) as raised:
        bench.open(*recipes, dials=(1.0, 0.0))
    said = "\n".join(raised.value.problems)
    for wanted in (
        "2 scales for 6 recipes",
        "a scale of 0 is no program",
        r"no-adapter-closed_form does not exist. Make it with 'compile-steer compile",
        "fine and foreign: the program was made for model 'another/model'",
        "stale-closed_form was compiled from another program",
        "shift: ",
        "is no PEFT adapter (closed_form makes a merged checkpoint)",
        "no-run.safetensors does not exist. Make it with 'compile-steer validate'",
    ):
        assert wanted in said


def test_one_recipe_twins_other_models_and_unknown_backends_are_refused(bench: Bench, two: tuple[Path, Path]) -> None:
    with pytest.raises(ArtifactError, match="found 1 recipe; needed: two or more"):
        bench.open(two[0])
    with pytest.raises(ArtifactError, match="2 recipes have the name 'high.tide'"):
        bench.open(two[0], two[0])
    with pytest.raises(ArtifactError, match="backend 'magic' is unknown; use one of bias"):
        bench.open(*two, backend="magic")
    other: Recipe = read_recipe(two[1]).model_copy(update={"model": "other"})
    with pytest.raises(ArtifactError, match=r"different values of 'model': .*\(high\.tide\), 'other' \(still\)"):
        CompositionRun.open([read_recipe(two[0]), other], (), "closed_form", bench.runs, bench.root, Progress())


def test_an_adapter_that_is_not_ours_is_refused(bench: Bench, two: tuple[Path, Path]) -> None:
    adapter = RunPaths(bench.runs / NAMES[0], NAMES[0]).adapter("closed_form")
    (adapter / "compile_steer.json").unlink()
    with pytest.raises(ArtifactError, match="it was not made by compile_steer"):
        bench.open(*two)
