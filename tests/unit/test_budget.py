"""`budget`: defaults of other keys, which a recipe's own keys override, and nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compile_steer.budget import BUDGETS
from compile_steer.common.errors import RecipeError
from compile_steer.recipe import Recipe, read_recipe
from tests.unit.test_recipe import GOOD

SHORT = GOOD.partition("validate:")[0] + "validate:\n  score: {kind: length, max_words: 12}\n"


def read(folder: Path, text: str, *changes: str) -> Recipe:
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    return read_recipe(folder / "tiny.yaml", changes)


def leaves(values: dict[str, Any]) -> dict[str, Any]:
    inner = {key: leaves(value) for key, value in values.items() if isinstance(value, dict)}
    flat = {f"{key}.{name}": value for key, part in inner.items() for name, value in part.items()}
    return flat | {key: value for key, value in values.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("budget", ["quick", "thorough"])
def test_a_budget_is_the_defaults_of_the_keys_that_it_lists_and_of_no_others(tmp_path: Path, budget: Any) -> None:
    standard = leaves(read(tmp_path, SHORT).record)
    chosen = leaves(read(tmp_path, f"budget: {budget}\n{SHORT}").record)
    changed = {key: value for key, value in chosen.items() if standard[key] != value}
    assert changed == leaves(BUDGETS[budget]) | {"budget": budget}


def test_the_recipes_own_keys_and_changes_go_first(tmp_path: Path) -> None:
    text = f"budget: quick\n{SHORT}  sweep_pairs: 7\ncompile:\n  calibration: {{prompts: 9}}\n"
    recipe = read(tmp_path, text, "verify.heldout=11", "validate.prompts=10")
    assert (recipe.validate_.sweep_pairs, recipe.validate_.prompts, recipe.verify.heldout) == (7, 10, 11)
    assert recipe.compile.calibration.prompts == 9
    assert recipe.compile.calibration.max_new_tokens == BUDGETS["quick"]["compile"]["calibration"]["max_new_tokens"]


def test_a_recorded_recipe_is_read_back_as_it_was_whatever_its_budget_says_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read(tmp_path, f"budget: quick\n{SHORT}")
    monkeypatch.setitem(BUDGETS, "quick", {"validate": {"sweep_pairs": 99}})
    assert Recipe.recall(recipe.record, recipe.folder) == recipe
    old = {key: value for key, value in recipe.record.items() if key != "budget"}  # of a version without the key
    assert Recipe.recall(old, recipe.folder).part("validate", "verify") == recipe.part("validate", "verify")


@pytest.mark.parametrize("value", ["fast", "[quick]", "{quick: 1}", "3"])
def test_another_budget_is_refused_with_what_there_is(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r"tiny\.yaml:1: budget: .*'quick', 'standard' or 'thorough'"):
        read(tmp_path, f"budget: {value}\n{SHORT}")


def test_a_section_that_is_missing_or_no_section_is_still_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"validate.*missing"):
        read(tmp_path, f"budget: quick\n{SHORT.partition('validate:')[0]}")
    with pytest.raises(RecipeError, match="verify: found 3"):
        read(tmp_path, f"budget: quick\n{SHORT}verify: 3\n")


def test_the_guide_says_what_each_budget_measures(tmp_path: Path) -> None:
    rows = (Path(__file__).parents[2] / "docs/guide/recipes.md").read_text("utf-8").partition("## Budget")[2]
    recipes = [read(tmp_path, f"budget: {budget}\n{SHORT}") for budget in BUDGETS]
    keys = {
        "validation pairs, prompts of the sweep": ("validate.sweep_pairs", "validate.sweep_prompts"),
        "test pairs measured, prompts answered": ("validate.pairs", "validate.prompts"),
        "random directions, from shuffled labels": ("validate.random_directions", "extract.shuffled"),
        "calibration prompts": ("compile.calibration.prompts",),
        "held-out prompts, test pairs, prompts of the verification": (
            "verify.heldout",
            "verify.pairs",
            "verify.prompts",
        ),
    }
    for row, names in keys.items():
        values = [", ".join(str(leaves(recipe.record)[name]) for name in names) for recipe in recipes]
        assert f"| {row} | {' | '.join(values)} |" in rows
