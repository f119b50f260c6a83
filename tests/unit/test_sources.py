"""Rows from the library `datasets`: columns, parts, limits, and everything that can be wrong with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compile_steer.common.errors import RecipeError
from compile_steer.data.sources import Dataset, Reader
from compile_steer.recipe import read_recipe

datasets = pytest.importorskip("datasets")

TABLE = {
    "query": [f"what is {n}?" for n in range(10)],
    "reply": [f"it is {n}" for n in range(10)],
    "note": ["ignored"] * 10,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV and a parquet file of the same table, and a cache of this test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict(TABLE)
    table.to_csv(str(tmp_path / "table.csv"))
    (tmp_path / "parts").mkdir()
    table.to_parquet(str(tmp_path / "parts" / "train.parquet"))
    return tmp_path


def rows(folder: Path, keys: tuple[str, ...] = ("prompt", "response"), **changes: Any) -> Sequence[dict[str, Any]]:
    reader = Reader(folder)
    rows_read = reader.rows("neutral", source(**changes), keys, ("history",))
    if reader.problems:
        raise RecipeError(reader.problems)
    return rows_read


def source(**changes: Any) -> Dataset:
    settings = {"source": "csv", "data_files": ["table.csv"], "columns": {"prompt": "query", "response": "reply"}}
    return Dataset.model_validate({**settings, **changes})


def test_files_of_a_format_and_a_folder_beside_the_recipe_give_the_same_rows(folder: Path) -> None:
    rows_read = rows(folder)
    assert rows_read[3] == {"prompt": "what is 3?", "response": "it is 3"}
    assert len(rows_read) == 10
    assert rows(folder, source="parts", data_files=[]) == rows_read
    assert rows(folder, source="parquet", data_files=["parts/train.parquet"]) == rows_read


def test_a_part_a_limit_and_a_seed_choose_rows(folder: Path) -> None:
    assert [row["prompt"][8] for row in rows(folder, split="train[60%:80%]")] == ["6", "7"]
    assert [row["prompt"][8] for row in rows(folder, limit=2)] == ["0", "1"]
    drawn = [[row["prompt"][8] for row in rows(folder, limit=6, seed=seed)] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != sorted(drawn[0])


def test_the_hash_is_of_the_rows_whatever_they_came_from(folder: Path) -> None:
    lines = "".join(json.dumps({"prompt": q, "response": r}) + "\n" for q, r in zip(TABLE["query"], TABLE["reply"]))  # noqa: B905
    (folder / "rows.jsonl").write_text(lines)
    first, second, third = Reader(folder), Reader(folder), Reader(folder)
    first.rows("neutral", source(), ("prompt", "response"))
    second.rows("neutral", Path("rows.jsonl"), ("prompt", "response"))
    third.rows("neutral", source(limit=9), ("prompt", "response"))
    assert first.hashes == second.hashes != third.hashes


def test_several_columns_make_one_list_and_numbers_among_them_are_text(folder: Path) -> None:
    (folder / "quiz.csv").write_text("question,A,B,C,key\ntwo and two?,3,4,5,1\nthe sky?,6,7,8,2\n")
    columns = {"choices": ["A", "B", "C"], "answer": "key"}
    rows_read = rows(folder, ("question", "choices", "answer"), data_files=["quiz.csv"], columns=columns)
    assert rows_read[0] == {"question": "two and two?", "choices": ["3", "4", "5"], "answer": 1}


def test_an_optional_column_is_taken_where_it_is_and_its_empty_cells_are_nothing(folder: Path) -> None:
    talk = [{"query": "a", "reply": "b", "history": None}, {"query": "c", "reply": "d", "history": [["e", "f"]]}]
    (folder / "talk.json").write_text("".join(json.dumps(row) + "\n" for row in talk))
    rows_read = rows(folder, source="json", data_files=["talk.json"])
    assert rows_read == [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d", "history": [["e", "f"]]}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "test"}, """data.neutral: 'csv' (table.csv, split test) cannot be loaded (Unknown split "test". Should be one of"""),
        ({"data_files": ["gone.csv"]}, "gone.csv"),
        ({"data_files": []}, "the format 'csv' needs data_files"),
        ({"source": "./no_such_folder", "data_files": []}, "cannot be loaded"),
        ({"columns": {}}, "has the columns note, query, reply, but no prompt, response. Name the column that holds each key: "
         "columns: {prompt: COLUMN, response: COLUMN}."),
        ({"columns": {"prompt": "query", "response": "answer"}}, "but no answer."),
        ({"columns": {"prompt": "query", "response": "reply", "promt": "note"}}, "data.neutral.columns: promt unknown; known "
         "here: prompt, response, history."),
        ({"columns": {"prompt": "query", "response": "reply", "history": "talk"}}, "but no talk"),
        ({"limit": 11}, "found 10 rows in 'csv' (table.csv, split train); limit asks for 11"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_explained(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        rows(folder, **changes)
    (line,) = caught.value.problems
    assert words in line


def test_a_wrong_column_gives_a_few_lines_and_a_count(folder: Path) -> None:
    (folder / "numbers.csv").write_text("prompt,response\n" + "".join(f"{n},{n}\n" for n in range(15)))
    with pytest.raises(RecipeError) as caught:
        rows(folder, data_files=["numbers.csv"], columns={})
    assert len(caught.value.problems) == 11
    assert (
        caught.value.problems[0]
        == "data.neutral, row 0: prompt, response must be text that is not empty and holds no NUL."
    )
    assert caught.value.problems[-1] == "data.neutral: 5 more rows like these."


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'compile-steer\[data\]'"):
        rows(folder)


def test_a_recipe_mixes_files_and_data_sets_and_names_the_problems_of_all(folder: Path) -> None:
    recipe = folder / "mixed.yaml"
    text = """\
name: mixed
model: some/model
data:
  train: {source: csv, data_files: [table.csv], split: 'train[:3]', columns: {prompt: query, positive: reply, negative: note}}
  validation: {source: csv, data_files: [gone.csv]}
  test: {source: csv, data_files: [table.csv], split: nothing}
  neutral: neutral.jsonl
  heldout: {source: csv, data_files: [table.csv], split: 'train[3:]', columns: {prompt: query}}
  calibration: {source: csv, data_files: [table.csv], split: 'train[2:3]', columns: {prompt: query}}
validate:
  score: {kind: length, max_words: 12}
"""
    recipe.write_text(text)
    recipe_read = read_recipe(recipe)
    assert read_recipe(recipe).hash == recipe_read.hash
    with pytest.raises(RecipeError) as caught:
        recipe_read.data.read(folder)
    lines = caught.value.problems
    assert [line.split(":")[0] for line in lines] == ["data.validation", "data.test", "data.neutral", "data"]
    assert "'what is 2?' is in both train and calibration" in lines[-1]
    recipe.write_text(text.replace("split: nothing", "splt: nothing"))
    with pytest.raises(RecipeError, match=r"mixed.yaml:6: data.test.splt: unknown key; did you mean 'split'\?"):
        read_recipe(recipe)


def test_a_source_without_a_name_is_not_whatever_lies_beside_the_recipe(folder: Path) -> None:
    write_rows = "".join(json.dumps({"prompt": q, "response": "w7"}) + "\n" for q in TABLE["query"])
    (folder / "train.jsonl").write_text(write_rows)
    with pytest.raises(ValidationError, match="at least 1 character"):
        rows(folder, source="", data_files=[])


def test_what_a_library_logs_of_a_file_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "broken.csv").write_bytes(b"query,reply\ncaf\xe9,x\n")
    with pytest.raises(RecipeError, match=r"'csv' \(broken.csv, split train\) cannot be loaded"):
        rows(folder, data_files=["broken.csv"])
    assert caplog.text == ""
