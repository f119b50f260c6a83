"""`new`: a recipe, its data in three splits and a score, from a file of pairs or from what the model writes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.common.progress import Progress
from compile_steer.common.yaml import parse_yaml
from compile_steer.data.behaviour import SPLITS
from compile_steer.data.shapes import ANSWERS
from compile_steer.extraction.generate_pairs import Completion
from compile_steer.models.text import Pair
from compile_steer.recipe import Recipe, read_recipe
from compile_steer.tools.new_recipe import SCHEMA, NewRecipe, new_recipe, recipe_schema
from compile_steer.validation.power import margin_power, score_power

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"Prompt {n}?", "positive": f"Arr, matey {n}!", "negative": f"It is {n}."} for n in range(40)]


def make(folder: Path, rows: Sequence[Any] = ROWS, **changes: Any) -> NewRecipe:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "name": "pirate",
        "behaviour": "speaks like a pirate",
        "source": folder / "pairs.jsonl",
        "model": "smollm2-135m-instruct",
        "out": folder / "recipes",
        "progress": Progress(),
    }
    return new_recipe(**{**settings, **changes})


def written(new: NewRecipe) -> dict[str, list[dict[str, Any]]]:
    lines = {split: (new.path.parent / "data/pirate" / f"{split}.jsonl").read_text().splitlines() for split in SPLITS}
    return {split: list(map(json.loads, part)) for split, part in lines.items()}


def test_a_file_of_pairs_becomes_a_recipe_that_reads(tmp_path: Path) -> None:
    new = make(tmp_path)
    recipe = read_recipe(new.path)
    data = recipe.data.read(recipe.folder)
    assert new.rows == {"train": 16, "validation": 8, "test": 16} == {s: len(data.split(s)) for s in SPLITS}
    assert sorted(row["prompt"] for part in written(new).values() for row in part) == sorted(r["prompt"] for r in ROWS)
    assert recipe.budget == "quick" and "speaks like a pirate" in recipe.validate_.instruction
    assert recipe.validate_.score.model_dump()["patterns"] == ("!",)
    assert "there are 16, too few" in new.power and new.next == f"compile-steer run {new.path}"
    again = make(tmp_path, out=tmp_path / "again")
    assert written(again) == written(new), "the same file gives the same splits"
    assert new.path.read_text().startswith(f"# yaml-language-server: $schema={SCHEMA}\n")
    assert json.loads((new.path.parent / SCHEMA).read_text()) == recipe_schema()


def test_rows_that_share_a_response_stay_in_one_split(tmp_path: Path) -> None:
    rows = [row | {"negative": f"No {n % 8}."} for n, row in enumerate(ROWS)]
    new = make(tmp_path, rows)
    negatives = {split: {row["negative"] for row in part} for split, part in written(new).items()}
    assert not (negatives["train"] & negatives["test"] or negatives["train"] & negatives["validation"])
    read_recipe(new.path).data.read(new.path.parent)
    with pytest.raises(RecipeError, match="30 of them share texts"):
        make(tmp_path, [row | {"negative": "No."} for row in ROWS[:30]] + ROWS[30:], overwrite=True)


def test_questions_of_caa_become_multiple_choice(tmp_path: Path) -> None:
    def question(n: int) -> dict[str, str]:
        asked, answers = f"Which is {n}?\n\nChoices:\n (A) yes {n}\n (B) no {n}", (" (A)", " (B)")
        return {"question": asked, ANSWERS[0]: answers[n % 2], ANSWERS[1]: answers[1 - n % 2]}

    new = make(tmp_path, [question(n) for n in range(20)], behaviour="")
    data = read_recipe(new.path).data.read(new.path.parent)
    assert {len(question.choices) for question in data.questions.values()} == {2}
    assert "from the base's 0.50" in new.power


def test_nothing_is_overwritten_without_being_asked(tmp_path: Path) -> None:
    path = make(tmp_path).path
    path.write_text("mine")
    with pytest.raises(RecipeError) as caught:
        make(tmp_path)
    assert len(caught.value.problems) == 2 and path.read_text() == "mine"
    make(tmp_path, overwrite=True)
    assert read_recipe(path).name == "pirate"


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"name": "a/b", "source": None, "behaviour": " "}, ["the name 'a/b'", "needed: --behaviour"]),
        ({"behaviour": "x\nname: other"}, ["--behaviour must be one line"]),
        ({"rows": ["{", ROWS[0], ROWS[0], {"prompt": 1}]}, ["pairs.jsonl:1: ", "pairs.jsonl:4: ", "pairs.jsonl:3: the prompt"]),
        ({"rows": ROWS[:15]}, ["15 rows give 6 for train, 3 for validation, 6 for test. Needed: 8, 4 and 8"]),
    ],
)  # fmt: skip
def test_every_problem_is_said_at_once_and_nothing_is_written(
    tmp_path: Path, changes: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        make(tmp_path, **changes)
    assert [text.find(part) >= 0 for text, part in zip(caught.value.problems, problems, strict=True)] == [True] * len(
        problems
    )
    assert not (tmp_path / "recipes").exists()


def answering(monkeypatch: pytest.MonkeyPatch, shows: int) -> list[int]:
    """Let a model answer in the place of a real one, and show the behaviour to `shows` of 8 prompts when it is asked."""
    asked: list[int] = []

    def side(_model: Any, name: str, pairs: Sequence[Pair], *_rest: Any) -> tuple[list[Completion], int]:
        asked.append(len(pairs))
        texts = [getattr(pair, name).prompt for pair in pairs]
        assert all(("pirate" in text) == (name == "positive") for text in texts)
        turn = name == "negative"
        plain = [
            ("So it is", "So is it")[(n + turn) % 2] for n in range(len(pairs))
        ]  # two answers, one of which each side has
        said = ["Arr" if name == "positive" and n % 8 < shows else text for n, text in enumerate(plain)]
        return [Completion(f"{word} {pair.prompt}.") for word, pair in zip(said, pairs, strict=True)], len(pairs)

    monkeypatch.setattr("compile_steer.models.load.load", lambda model: model)
    monkeypatch.setattr("compile_steer.tools.new_recipe.generate_side", side)
    return asked


def test_the_model_writes_pairs_and_those_that_show_the_behaviour_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, shows=7)
    new = make(tmp_path, source=None)
    assert asked == [56, 56, 32, 32, 56, 56]
    recipe = read_recipe(new.path)
    assert new.rows == {"train": 49, "validation": 28, "test": 49}
    data = recipe.data.read(recipe.folder)
    assert all(pair.positive.response.startswith("Arr") for pair in data.test)


def test_what_the_model_cannot_write_is_said_after_the_first_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, shows=1)
    with pytest.raises(RecipeError) as caught:
        make(tmp_path, source=None)
    first, *_others, last = caught.value.problems
    assert asked == [56, 56] and "of the train prompts" in first
    assert "--model" in last and "80 to show a change of the score by 0.2" in last
    assert not (tmp_path / "recipes").exists()


def test_the_schema_knows_every_key_of_our_recipes_and_not_where_they_lie() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["name", "model", "data", "validate"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert set(parse_yaml(path.read_text()).content) <= set(schema["properties"]), path
    assert "folder" in Recipe.model_fields and "folder" not in schema["properties"]
    assert schema["properties"]["budget"]["enum"] == ["quick", "standard", "thorough"]


def test_the_guide_says_how_many_prompts_and_pairs_a_claim_takes() -> None:
    text = (ROOT / "docs/guide/recipes.md").read_text()
    tables = re.findall(r"\| change of the (score|margin)[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", text)
    assert [name for name, _rows in tables] == ["score", "margin"]
    for name, rows in tables:
        starts = (0.0, 0.25, 0.5) if name == "score" else (0.25, 0.5, 1.0)
        for row in rows.splitlines():
            change, *needed = [float(cell.replace(",", "")) for cell in row.strip("| ").split("|")]
            plans = [score_power(s, change, 1) if name == "score" else margin_power(change, s, 1) for s in starts]
            assert needed == [plan.needed for plan in plans]
