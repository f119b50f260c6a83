"""Data: every problem at once, and disjoint splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS, Behaviour
from compile_steer.data.kinds import PairsData
from compile_steer.models.text import Text

Row = dict[str, Any]


def pair(prompt: str, positive: str | None = None, negative: str | None = None) -> Row:
    return {"prompt": prompt, "positive": positive or f"{prompt} high", "negative": negative or f"{prompt} low"}


def good() -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {name: [pair(f"{name} {n}") for n in range(2)] for name in SPLITS}
    rows["neutral"] = [{"prompt": "neutral 0", "response": "plain"}]
    return rows | {name: [{"prompt": f"{name} {n}"} for n in range(3)] for name in ("heldout", "calibration")}


def write(folder: Path, rows: dict[str, list[Row]]) -> dict[str, Path]:
    files = {}
    for name, content in rows.items():
        files[name] = folder / f"{name}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in content]
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def read_behaviour(files: dict[str, Path], positive: str, negative: str) -> Behaviour:
    data = PairsData.model_validate({**files, "positive_template": positive, "negative_template": negative})
    return data.read(Path("never looked at: the paths are absolute"))


def problems(files: dict[str, Path], positive: str = "{prompt} Sing.", negative: str = "{prompt}") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_behaviour(files, positive, negative)
    return list(caught.value.problems)


# --------------------------------------------------------------------------------------------- files


def test_good_data_is_read_with_its_templates_and_hashes(tmp_path: Path) -> None:
    data = read_behaviour(write(tmp_path, good()), "{prompt} Sing.", "So: {prompt}")
    assert [p.prompt for p in data.validation] == ["validation 0", "validation 1"]
    assert data.test[1].positive == Text("test 1 Sing.", "test 1 high")
    assert data.test[1].negative == Text("So: test 1", "test 1 low")
    assert data.neutral == (Text("neutral 0", "plain"),)
    assert (len(data.heldout), data.calibration[2].prompt) == (3, "calibration 2")
    assert set(data.hashes) == {*SPLITS, "neutral", "heldout", "calibration"}


def test_a_hash_follows_the_content_and_not_the_layout_of_a_file(tmp_path: Path) -> None:
    files = write(tmp_path, good())
    before = read_behaviour(files, "{prompt}", "{prompt}").hashes
    text = files["test"].read_text(encoding="utf-8")
    files["test"].write_text("\n" + text.replace(": ", ":   ") + "\n\n", encoding="utf-8")
    assert read_behaviour(files, "{prompt}", "{prompt}").hashes == before
    files["test"].write_text(text.replace("high", "higher", 1), encoding="utf-8")
    after = read_behaviour(files, "{prompt}", "{prompt}").hashes
    assert {name for name in before if before[name] != after[name]} == {"test"}


def test_every_problem_of_every_file_is_reported_at_once(tmp_path: Path) -> None:
    rows: dict[str, list[Any]] = {**good()}
    rows["train"] = ["{not json", pair("a"), ["a", "list"], {"prompt": "b", "positive": "c"}]
    rows["validation"] = [{**pair("d"), "note": "extra"}, pair("e", positive=" "), {**pair("f"), "negative": 3}]
    rows["neutral"] = []
    files = write(tmp_path, rows)
    files["heldout"].unlink()
    files["calibration"].write_bytes(b"\xff\xfe{}")
    lines = problems(files, positive="no place", negative="{prompt} and {prompt}")
    expected = [
        "train.jsonl:1: not JSON",
        "train.jsonl:3: found list; needed the keys prompt, positive, negative",
        "train.jsonl:4: found ['positive', 'prompt']; needed the keys",
        "validation.jsonl:1: found ['negative', 'note', 'positive', 'prompt']; needed the keys",
        "validation.jsonl:2: positive must be text that is not empty and holds no NUL",
        "validation.jsonl:3: negative must be text that is not empty and holds no NUL",
        "data.neutral: ",
        "data.heldout: ",
        "data.calibration: ",
        "data.positive_template 'no place' must contain {prompt} exactly once",
        "data.negative_template '{prompt} and {prompt}' must contain {prompt} exactly once",
    ]
    assert len(lines) == len(expected)
    for start, line in zip(expected, lines, strict=True):
        assert line.startswith(start)
    assert "is empty; needed: one JSON object a line with prompt, response" in lines[6]
    assert "cannot be read (No such file or directory)" in lines[7]
    assert "cannot be read" in lines[8]


@pytest.mark.parametrize("other", ["validation", "test", "neutral", "heldout", "calibration"])
def test_a_prompt_in_two_files_is_refused_whatever_its_case_and_spaces(tmp_path: Path, other: str) -> None:
    rows = good()
    rows[other][0]["prompt"] = "TRAIN \t 1"
    (line,) = problems(write(tmp_path, rows))
    places = f"(train.jsonl:2, {other}.jsonl:1); the splits must not overlap."
    assert line == f"data: the prompt 'TRAIN \\t 1' is in both train and {other} {places}"


def test_the_packages_own_texts_leave_out_what_the_recipe_asks(tmp_path: Path) -> None:
    rows = good()
    del rows["heldout"], rows["calibration"]
    plain = read_behaviour(write(tmp_path, rows), "{prompt} Sing.", "{prompt}")
    rows["train"][0]["prompt"] = plain.heldout[3].prompt.upper()
    rows["neutral"][0]["prompt"] = plain.calibration[5].prompt
    data = read_behaviour(write(tmp_path, rows), "{prompt} Sing.", "{prompt}")
    assert data.heldout == plain.heldout[:3] + plain.heldout[4:]
    assert data.calibration == plain.calibration[:5] + plain.calibration[6:]


def test_a_prompt_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    rows = good()
    rows["heldout"] += [{"prompt": "Heldout 0"}, {"prompt": "heldout  0"}]
    (line,) = problems(write(tmp_path, rows))
    assert (
        line
        == "data.heldout: the prompt 'heldout 0' occurs 3 times (heldout.jsonl:1, heldout.jsonl:4, heldout.jsonl:5)."
    )


def test_a_response_of_one_split_in_another_is_refused(tmp_path: Path) -> None:
    rows = good()
    rows["test"][1] = pair("another prompt", positive="Train 0 high")
    (line,) = problems(write(tmp_path, rows))
    assert (
        line
        == "data: the response 'Train 0 high' is in both train and test (train.jsonl:1, test.jsonl:2); the splits must not overlap."
    )


def test_sides_that_are_equal_are_refused_unless_the_templates_tell_them_apart(tmp_path: Path) -> None:
    rows = good()
    rows["train"] = [pair("a", "same", "same "), pair("b")]
    files = write(tmp_path, rows)
    (line,) = problems(files, positive="{prompt}")
    assert line == "data.train: positive and negative are the same text for 'a' (train.jsonl:1; 1 pairs)."
    assert read_behaviour(files, "{prompt} Sing.", "{prompt}").train[0].positive.response == "same"


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path: Path) -> None:
    rows = good()
    rows["test"] = [pair("one\N{LINE SEPARATOR}two\x85three"), pair("b")]
    data = read_behaviour(write(tmp_path, rows), "{prompt}", "{prompt}")
    assert data.test[0].prompt == "one\N{LINE SEPARATOR}two\x85three"


def test_a_history_is_read_and_checked(tmp_path: Path) -> None:
    rows = good()
    rows["heldout"][0]["history"] = [["hello", "good day"]]
    assert read_behaviour(write(tmp_path, rows), "{prompt}", "{prompt}").heldout[0].history == (("hello", "good day"),)
    for bad in ("hello", [["hello"]], [["hello", ""]], [["hello", 3]]):
        rows["heldout"][0]["history"] = bad
        (line,) = problems(write(tmp_path, rows))
        assert "history must be a list of [user, assistant] pairs" in line
    rows["heldout"][0].pop("history")
    rows["train"][0]["history"] = [["hello", "good day"]]
    assert "needed the keys" in problems(write(tmp_path, rows))[0]
