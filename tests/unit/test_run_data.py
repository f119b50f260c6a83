"""The data of an open run: generated pairs, another behaviour's pairs, and pairs that the model cannot tell apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compile_steer.artifacts.files import sha256
from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common import distributed
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import SPLITS, Context
from compile_steer.models.source import cache_folder
from compile_steer.models.text import Pair, Text
from compile_steer.pipeline.artifacts import compile_program
from compile_steer.pipeline.run import Run, require_apart
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.tools.lineage import data_hashes
from tests.helpers.generation import N_PROMPTS, generated, generating_model, generating_recipe, read_rows
from tests.helpers.small_run import SmallRun, prepare
from tests.helpers.verification import RecordedNotes


@pytest.fixture
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = generating_model()
    monkeypatch.setattr("compile_steer.pipeline.run.load", lambda *_args, **_options: model)
    monkeypatch.setattr("compile_steer.pipeline.run.require_memory", lambda _recipe, _data: "")  # it is in no folder


def test_a_base_without_a_chat_template_is_said_before_any_work(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    notes = RecordedNotes()
    Run.open(run.read(), run.paths.out, notes)
    assert notes.texts[0].startswith("memory planned: weights ")
    assert "has no chat template" in notes.texts[1] and 'prompt_format: "User: {prompt}' in notes.texts[1]


@pytest.mark.usefixtures("_tiny_model")
def test_an_open_run_has_its_generated_pairs_and_replaces_a_damaged_report(tmp_path: Path) -> None:
    run = Run.open(generating_recipe(tmp_path), tmp_path / "out", Progress())
    assert run.generated_pairs().splits["train"].kept == len(run.data.train) > 0
    assert "w50" in run.data.train[0].positive.prompt
    run.paths.generation_report.write_text('{"splits": []}')
    with pytest.raises(ArtifactError, match="Run 'compile-steer generate-pairs'"):
        run.generated_pairs()
    again = Run.open(run.recipe, run.paths.out, Progress())
    assert again.data == run.data


def test_a_run_records_the_hashes_of_the_prompts_and_of_the_generated_pairs(tmp_path: Path) -> None:
    recipe, model = generating_recipe(tmp_path), generating_model()
    data, _report = generated(recipe, model, tmp_path / "out")
    prompts = recipe.data.read(tmp_path)
    paths = RunPaths(tmp_path / "out", "generated")
    recorded = Run(recipe, paths, Context(model, data)).origin().data_sha256
    assert recorded == data_hashes(recipe, paths)[0]
    assert recorded["train, prompts"] == prompts.hashes["train"] != data.hashes["train"]


@pytest.mark.usefixtures("_tiny_model")
def test_an_open_run_has_another_behaviours_pairs_as_they_are_in_their_file(tmp_path: Path) -> None:
    record = generating_recipe(tmp_path).model_dump(by_alias=True)
    record["validate"]["other_behaviour"] = "other.jsonl"
    recipe = Recipe.model_validate({**record, "folder": tmp_path})
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "w8", "positive": "w7", "negative": "w9"}')
    run = Run.open(recipe, tmp_path / "out", Progress())
    assert run.data.other_behaviour == (Pair(Text("w8", "w7"), Text("w8", "w9"), "w8"),)
    assert len(run.data.train) > 0
    path.write_text('{"prompt": "w8", "positive": ""}')
    with pytest.raises(RecipeError, match="other.jsonl:1: found .* needed the keys prompt, positive, negative"):
        Run.open(recipe, tmp_path / "out", Progress())


@pytest.mark.usefixtures("_tiny_model")
def test_pairs_that_the_model_cannot_tell_apart_are_refused_before_any_work(tmp_path: Path) -> None:
    """Pairs of kind 'pairs', so that there is nothing to generate; the tokenizer drops spaces."""
    recipe = generating_recipe(tmp_path)
    for name in SPLITS:
        path = tmp_path / f"{name}.jsonl"
        rows = [{**row, "positive": f"{name} text", "negative": f"{name}  text"} for row in read_rows(path)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
    section = {**recipe.data.model_dump(exclude={"kind", "generate"}), "positive_template": "{prompt}"}
    record = {**recipe.model_dump(by_alias=True), "data": section, "folder": tmp_path}
    with pytest.raises(RecipeError, match=f"the two sides of {N_PROMPTS} of {N_PROMPTS} pairs are the same tokens"):
        Run.open(Recipe.model_validate(record), tmp_path / "out", Progress())
    for name in SPLITS:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({**row, "positive": f"{name} w7"}) for row in read_rows(path)))
    run = Run.open(Recipe.model_validate(record), tmp_path / "out", Progress())
    with pytest.raises(RecipeError, match="data.kind pairs: its rows have their responses"):
        run.generated_pairs()
    assert not run.paths.out.exists()


@pytest.mark.parametrize(
    ("split", "row", "said"),
    [
        ("train", {"prompt": "w9 " * 99}, r"train.jsonl:2: prompt: \d+ tokens do not fit"),
        ("test", {"positive": "w9 " * 99}, r"test.jsonl:2: prompt and positive: \d+ tokens"),
        (
            "validation",
            {"negative": "w9 </s>"},
            "validation.jsonl:2: negative: .* reads the control token </s> in the text 'w9",
        ),
        ("train", {"prompt": "w9 <s>"}, "train.jsonl:2: prompt: .* reads the control token <s>"),
        ("neutral", {"response": "</s> w9"}, "neutral.jsonl:2: response: .* reads the control token </s>"),
        ("heldout", {"prompt": "w9 </s>"}, "heldout.jsonl:2: prompt: .* reads the control token </s>"),
        (
            "other_behaviour",
            {"positive": "w9 </s>"},
            "other_behaviour.jsonl:2: positive: .* reads the control token </s>",
        ),
    ],
)
def test_what_the_model_cannot_read_is_named_by_file_line_and_key(
    split: str, row: dict[str, str], said: str, run: SmallRun
) -> None:
    path = run.recipe.parent / "data" / f"{split}.jsonl"
    rows = read_rows(path)
    rows[1] |= row
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RecipeError, match=f"^{said}"):
        run.open()


def test_another_path_to_the_same_model_makes_nothing_again(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(Path(str(run.read().model)), run.root / "moved")
    monkeypatch.chdir(run.root)
    again = Run.open(read_recipe(run.recipe, ["model=./moved/"]), run.paths.out, Progress())
    assert again.model.id != run.read().model
    for name in ("run.extract", "run.validate", "artifacts.Lowering.regression_texts"):
        monkeypatch.setattr(f"compile_steer.pipeline.{name}", None)  # whoever calls it fails
    files = [run.paths.directions, run.paths.program, run.paths.validation]
    files += [
        run.paths.adapter("closed_form") / "adapter_model.safetensors",
        run.paths.adapter("bias") / "patch.safetensors",
    ]
    before = [sha256(file) for file in files]
    again.validate()
    folders = compile_program(again, force=True)
    assert [sha256(file) for file in files] == before
    # What names the base names it as it is called now.
    assert [Provenance.read_unedited(folder).model for folder in folders] == ["./moved/"] * 2
    assert json.loads((folders[1] / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        run.root / "moved"
    )
    # Moved once more, by the same name from another folder.
    (run.root / "elsewhere").mkdir()
    shutil.move(run.root / "moved", run.root / "elsewhere" / "moved")
    monkeypatch.chdir(run.root / "elsewhere")
    (_bias, adapter) = compile_program(
        Run.open(read_recipe(run.recipe, ["model=./moved/"]), run.paths.out, Progress()), force=True
    )
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(run.root / "elsewhere" / "moved")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["validate.other_behaviour=../runs/tide/vectors/tide.prompts.jsonl"],
            "validate.other_behaviour: .*tide.prompts.jsonl",
        ),
        (["model=OUT/merged/tide-bias-fp32/"], "model: .*tide-bias-fp32"),
        (
            ["extract={method: imported, imported: {file: ../runs/tide/vectors/tide.safetensors}}"],
            "extract.imported.file: .*",
        ),
        (
            ["data.kind=generated", "data.positive_template='{prompt} w9'", "data.test=OUT/data/tide.test.jsonl"],
            "data.test: .*",
        ),
        (["data.train={source: json, data_files: [a.json, OUT/tide.html]}"], "data.train.data_files: .*tide.html"),
        (["validate.score={kind: classifier, model: OUT/adapters/tide-distill, label: x}"], "validate.score.model: .*"),
    ],
)
def test_a_run_that_would_write_over_what_it_reads_is_refused(changes: list[str], said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "tide.yaml"
    recipe.parent.mkdir()
    data = {split: f"{split}.jsonl" for split in SPLITS}
    score = {"kind": "keywords", "patterns": ["x"]}
    recipe.write_text(json.dumps({"name": "tide", "model": "m", "data": data, "validate": {"score": score}}))
    out = tmp_path / "recipes" / ".." / "runs" / "tide"
    changed = read_recipe(recipe, [change.replace("OUT", str(tmp_path / "runs" / "tide")) for change in changes])
    with pytest.raises(RecipeError, match=f"^{said} is where the run itself writes"):
        require_apart(changed, RunPaths(out, "tide"))
    require_apart(changed, RunPaths(tmp_path / "runs" / "other", "tide"))
    require_apart(changed, RunPaths(out, "ebb"))


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["two", "", "-1", "1.5", "\u0663", "9" * 5000])
def test_environment_variables_of_torchrun_that_are_no_numbers_are_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=f"the environment variable {variable} is"):
        distributed.rank() if variable == "RANK" else distributed.count()


@pytest.mark.parametrize(("rank", "count"), [("1", None), ("0", "0"), ("2", "2")])
def test_a_rank_that_no_process_has_is_refused(rank: str, count: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(RecipeError, match="the environment variable"):
        distributed.rank()


def test_a_name_that_no_disk_can_hold_is_refused_before_any_work(run: SmallRun) -> None:
    with pytest.raises(RecipeError, match=r"name: found 'x.*should match pattern .*0,99"):
        read_recipe(run.recipe, [f"name={'x' * 101}"])


@pytest.mark.parametrize("value", ["~nobody at all/cache", "~nobody at all"])
def test_a_cache_in_the_home_of_nobody_is_no_folder_here(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_STEER_CACHE", value)
    with pytest.raises(RecipeError, match="COMPILE_STEER_CACHE"):
        cache_folder()
    monkeypatch.setenv("COMPILE_STEER_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "compile_steer"
