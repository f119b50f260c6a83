"""Rows as people have them: contrastive activation addition, preference data, chat messages; JSON, CSV and Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.pairs import Pairs
from compile_steer.data.shapes import ANSWERS, QUESTION, reshaped
from compile_steer.data.sources import Reader
from compile_steer.models.text import Text

PAIR = {"prompt": "Who are you?", "positive": "Arr!", "negative": "A model."}
CAA = {"question": "Who are you?", ANSWERS[0]: " Arr! ", ANSWERS[1]: "A model.", "label_confidence": 0.9}
LETTERED = "Which one?\n\nChoices:\n (A) the red\none\n (B) the blue one"


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, PIRATE, MODEL = said("user", "Who are you?"), said("assistant", "Arr!"), said("assistant", "A model.")
SAME_PAIR: list[dict[str, Any]] = [
    PAIR,
    CAA | {ANSWERS[0]: "Arr!"},
    {"prompt": "Who are you?", "chosen": "Arr!", "rejected": "A model.", "score": 3},
    {"chosen": [USER, PIRATE], "rejected": [USER, MODEL]},
    {"prompt": [USER], "chosen": [PIRATE], "rejected": [MODEL]},
    {"messages": [USER], "positive": "Arr!", "negative": [MODEL]},
    {"positive": [said("user", [{"type": "text", "text": "Who are you?"}]), PIRATE], "negative": [USER, MODEL]},
]


@pytest.mark.parametrize("row", SAME_PAIR)
def test_every_shape_of_a_pair_gives_the_same_pair(row: dict[str, Any], tmp_path: Path) -> None:
    expected = Pairs.from_list([PAIR])
    for name, text in (("x.jsonl", json.dumps(row)), ("x.json", json.dumps([row], indent=1))):
        (tmp_path / name).write_text(text)
        assert Pairs.from_file(tmp_path / name) == Pairs.from_list([row]) == expected
    assert Pairs.from_dataset([row]) == expected


def test_csv_and_parquet_files_are_read_by_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number, row in enumerate((PAIR, CAA, SAME_PAIR[3])):
        table = datasets.Dataset.from_list([row])
        table.to_parquet(str(tmp_path / f"{number}.parquet"))
        assert len(Pairs.from_file(tmp_path / f"{number}.parquet")) == 1
        if number < 2:
            table.to_csv(str(tmp_path / f"{number}.csv"))
            assert Pairs.from_file(tmp_path / f"{number}.csv")[0].prompt == "Who are you?"
    with pytest.raises(RecipeError, match=r"missing.csv"):
        Pairs.from_file(tmp_path / "missing.csv")


@pytest.mark.parametrize(
    ("question", "matching", "other", "expected"),
    [
        (LETTERED, " (B)", " (A)", ("Which one?", ["the red\none", "the blue one"], 1)),
        ("Is it so?\nA. yes\nB. no\nAnswer:", "no", "yes", ("Is it so?", ["yes", "no"], "no")),
        ("Is it so?", " Yes", " No", ("Is it so?", ["No", "Yes"], 1)),
    ],
)
def test_questions_of_caa_become_multiple_choice(question: str, matching: str, other: str, expected: Any) -> None:
    row = {"question": question, ANSWERS[0]: matching, ANSWERS[1]: other}
    assert tuple(reshaped(row, QUESTION).values()) == expected


def test_messages_become_a_text_with_its_history_and_system_prompt(tmp_path: Path) -> None:
    talk = [said("system", "Be kind."), said("user", "Hi."), said("assistant", "Hello."), USER, MODEL]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk, "id": 7}) + "\n")
    (row,) = Reader(tmp_path).rows("neutral", Path("x.jsonl"), ("prompt", "response"), ("history", "system"))
    assert row == {
        "prompt": "Who are you?",
        "response": "A model.",
        "history": [["Hi.", "Hello."]],
        "system": "Be kind.",
    }
    (row,) = Reader(tmp_path).rows("heldout", Path("x.jsonl"), ("prompt",), ("history", "system"))
    assert "response" not in row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": [USER, PIRATE], "rejected": [said("user", "And you?"), MODEL]}, "negative must answer the same"),
        (
            {"chosen": [USER], "rejected": [USER, MODEL]},
            "positive must end with a message of the assistant; found user",
        ),
        ({"chosen": [PIRATE], "rejected": [MODEL]}, "user first"),
        ({"prompt": [said("system", "Be kind."), USER], "chosen": "a", "rejected": "b"}, "data.positive_system"),
        ({"prompt": [said("tool", "x")], "chosen": "a", "rejected": "b"}, "roles system, user and assistant"),
        ({"prompt": [USER], "chosen": [said("assistant", None)], "rejected": "b"}, "roles system, user and"),
        ({"question": "a", ANSWERS[0]: 3, ANSWERS[1]: "b"}, "positive must be text"),
        ({"chosen": "a", "rejected": "b"}, "found ['chosen', 'rejected']; needed the keys prompt"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_file_and_line(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(RecipeError) as caught:
        Pairs.from_file(path)
    (line,) = caught.value.problems
    assert line.startswith("x.jsonl:3: ") and problem in line


def test_letters_without_choices_and_other_than_texts_are_refused() -> None:
    for matching, other, problem in ((" (A)", " (B)", "lists no choices"), (3, "b", "must be texts")):
        with pytest.raises(ValueError, match=problem):
            reshaped({"question": "Is it so?", ANSWERS[0]: matching, ANSWERS[1]: other}, QUESTION)


def test_a_system_prompt_reaches_the_text() -> None:
    from compile_steer.data.sources import Row, text_of

    row = Row({"prompt": "a", "response": "b", "history": [["c", "d"]], "system": "e"})
    assert text_of(row) == Text("a", "b", (("c", "d"),), "e")
