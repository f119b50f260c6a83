"""Recipes: what is refused, in which words, and what `--set` changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS
from compile_steer.recipe import Recipe, read_recipe, rewritten

GOOD = """\
name: tiny
model: some/model
data:
  train: a/train.jsonl
  validation: validation.jsonl
  test: test.jsonl
  neutral: neutral.jsonl
  heldout: heldout.jsonl
  calibration: /abs/calibration.jsonl
validate:
  score: {kind: length, max_words: 12}
  coefficients: [-0.5, 1, 2e0]
compile:
  backends: [closed_form, distill]
  closed_form:
    stages:
      - {offset: 0, projection: mlp, rank: 1}
      - {offset: 1, projection: attn, rank: 4}
  distill:
    learning_rate: 1e-5
"""


SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def read(folder: Path, text: str = GOOD, *changes: str) -> Recipe:
    path = folder / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, changes)


def problems(folder: Path, text: str = GOOD, *changes: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *changes)
    return [re.sub(r"^tiny\.yaml:\d+:", "tiny.yaml:", problem) for problem in caught.value.problems]


def test_a_problem_names_the_line_of_its_key_in_the_file(tmp_path: Path) -> None:
    wrong = GOOD.replace("model: some", "modle: some").replace("max_words: 12", "max_words: x")
    number = {word: 1 + wrong[: wrong.index(word)].count("\n") for word in ("modle", "max_words")}
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, wrong, "seed=-1")
    places = [problem.split(": ")[0] for problem in caught.value.problems]
    # What is missing has no line, and what --set says is not in the file.
    assert places == ["tiny.yaml", "tiny.yaml", f"tiny.yaml:{number['max_words']}", f"tiny.yaml:{number['modle']}"]


def test_a_good_recipe_is_read_and_its_paths_are_relative_to_its_folder(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert found.validate_.coefficients == (-0.5, 1.0, 2.0)
    assert found.compile.closed_form.stages is not None
    stages = [(stage.offset, stage.projection, stage.rank) for stage in found.compile.closed_form.stages]
    assert stages == [(0, "mlp", 1), (1, "attn", 4)]
    with pytest.raises(RecipeError) as caught:
        found.data.read(found.folder)
    where = [line.split()[1] for line in caught.value.problems]
    names = ("a/train", "validation", "test", "neutral", "heldout")
    assert where == [*(str(tmp_path / f"{name}.jsonl") for name in names), "/abs/calibration.jsonl"]


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    assert read(tmp_path).compile.distill.learning_rate == 1e-5
    assert read(tmp_path, GOOD, "verify.gates.exact_kl=3e-7").verify.gates.exact_kl == 3e-7


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (("model: some", "modle: some"), "modle: unknown key; did you mean 'model'?"),
        (("validate:", "validat:"), "validat: unknown key; did you mean 'validate'?"),
        (("  neutral:", "  nuetral:"), "data.nuetral: unknown key; did you mean 'neutral'?"),
        (
            ("learning_rate:", "learnin_rate:"),
            "compile.distill.learnin_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (("max_words: 12", "max_wrds: 12"), "validate.score.max_wrds: unknown key; did you mean 'max_words'?"),
        (("offset: 0", "ofset: 0"), "compile.closed_form.stages.0.ofset: unknown key; did you mean 'offset'?"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_likely_one(tmp_path: Path, wrong: tuple[str, str], line: str) -> None:
    assert f"tiny.yaml: {line}" in problems(tmp_path, GOOD.replace(*wrong, 1))


_PARTS = "score: {kind: all, all_of: [{kind: lowercase}, {kind: keywords, patterns: [sea]}]}"


@pytest.mark.parametrize(
    ("score", "line"),
    [
        (
            _PARTS.replace("patterns", "patern"),
            "validate.score.all_of.1.patern: unknown key; did you mean 'patterns'?",
        ),
        (_PARTS.replace("patterns: [sea]", "absent: [sea]"), "validate.score.all_of.1.patterns: missing."),
        (_PARTS.replace("all_of", "al_of"), "validate.score.al_of: unknown key; did you mean 'all_of'?"),
        ("score: {kind: repetition, mx: .3}", "validate.score.mx: unknown key; did you mean 'max'?"),
        (
            "score: {kind: judge, base_ur: 'http://localhost'}",
            "validate.score.base_ur: unknown key; did you mean 'base_url'?",
        ),
        ("score: {kind: ended, max: 3}", "validate.score.max: unknown key; known here: kind."),
    ],
)
def test_a_misspelt_key_of_a_scorer_is_answered_in_its_own_terms(tmp_path: Path, score: str, line: str) -> None:
    assert f"tiny.yaml: {line}" in problems(tmp_path, GOOD.replace("score: {kind: length, max_words: 12}", score))


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("score: {kind: keyword}", "validate.score.kind: found 'keyword'; needed: 'keywords', 'lowercase', 'length', "),
        (
            "score: {kind: all, all_of: [{kind: lowercase}, {kind: all}]}",
            "validate.score.all_of.1.kind: found 'all'; needed: ",
        ),
        ("score: {kind: length}", "give max_words, min_words, or both"),
        ("score: {max_words: 3}", "unable to extract tag using discriminator 'kind'"),
        ("score: {kind: choice}\n  positions: response", "a choice is made at the prompt's last token"),
        (
            "score: {kind: all, all_of: [{kind: ended}, {kind: choice}]}\n  positions: response",
            "a choice is made at the prompt's last token",
        ),
    ],
)
def test_a_scorer_that_cannot_be_is_refused_in_words(tmp_path: Path, score: str, words: str) -> None:
    assert words in "\n".join(problems(tmp_path, GOOD.replace("score: {kind: length, max_words: 12}", score)))


def test_an_ablation_is_of_all_positions(tmp_path: Path) -> None:
    changes = ("extract.operation=ablate", "validate.coefficients=[1]", "validate.positions=response")
    (line,) = problems(tmp_path, GOOD, *changes)
    assert line.startswith("tiny.yaml: validate.positions: found 'response', but extract.operation ablate edits the")
    assert "'data'" not in line and ".." not in line
    assert read(tmp_path, GOOD, *changes[:2]).extract.operation == "ablate"


def test_a_choice_may_be_steered_where_it_is_made(tmp_path: Path) -> None:
    score = "score: {kind: choice}\n  positions: last_prompt+response"
    assert read(tmp_path, GOOD.replace("score: {kind: length, max_words: 12}", score)).validate_.score.kind == "choice"


def test_a_key_unlike_any_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD + "verify: {zzz: 1}\n")
    start = "tiny.yaml: verify.zzz: unknown key; known here: "
    assert found.startswith(start)
    known = found.removeprefix(start).removesuffix(".").split(", ")
    assert {"forms", "gates", "heldout", "pairs"} <= set(known)
    assert known == sorted(known)


def test_every_problem_of_a_recipe_is_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("  test: test.jsonl\n", "").replace("rank: 4", "rank: 0").replace("[-0.5, 1, 2e0]", "[1, 0]")
    found = problems(tmp_path, text + "seed: many\nextract: {method: magic}\nspeed: 9\n")
    assert sorted(line.split(": ")[1] for line in found) == [
        "compile.closed_form.stages.1.rank",
        "data.test",
        "extract.method",
        "seed",
        "speed",
        "validate.coefficients",
    ]
    by_key = {line.split(": ")[1]: line for line in found}
    assert by_key["data.test"].endswith("missing.")
    assert "found 0; input should be greater than or equal to 1." in by_key["compile.closed_form.stages.1.rank"]
    assert "found 'many'; input should be a valid integer" in by_key["seed"]
    assert "a coefficient of 0 steers nothing" in by_key["validate.coefficients"]
    assert "'mean_difference', 'pca', 'logistic', " in by_key["extract.method"]


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (("name: tiny", "name: ../tiny"), "name"),
        (("kind: length", "kind: vibes"), "validate.score"),
        (("max_words: 12", "max_words: twelve"), "validate.score.max_words"),
        (("[closed_form, distill]", "[closed_form, magic]"), "compile.backends"),
        (("projection: mlp", "projection: head"), "compile.closed_form.stages.0.projection"),
        (("coefficients:", "positions: everywhere\n  coefficients:"), "validate.positions"),
        (("coefficients:", "layers: [3, -1]\n  coefficients:"), "validate.layers"),
        (("coefficients:", "layers: []\n  coefficients:"), "validate.layers"),
        (("coefficients:", "random_directions: 19\n  coefficients:"), "validate.random_directions"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_key(tmp_path: Path, wrong: tuple[str, str], key: str) -> None:
    assert wrong[0] in GOOD
    found = problems(tmp_path, GOOD.replace(*wrong, 1))
    assert any(line.startswith(f"tiny.yaml: {key}") for line in found)
    assert not any(line.endswith("..") for line in found)


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD + "seed: 3\nseed: 4\n")
    assert "is not valid YAML" in found
    assert "line 22: the key 'seed' is given twice (first in line 21)" in found


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    assert "is not valid YAML" in problems(tmp_path, "a: [1, 2")[0]
    assert "is list; needed: keys and values" in problems(tmp_path, "- a\n- b\n")[0]
    assert "is empty; needed: keys and values" in problems(tmp_path, "")[0]
    assert "folder: unknown key" in problems(tmp_path, GOOD + "folder: /tmp\n")[0]
    with pytest.raises(RecipeError, match=r"none\.yaml cannot be read \(No such file or directory\)"):
        read_recipe(tmp_path / "none.yaml")


def test_set_changes_nested_values_lists_and_sections_that_were_not_there(tmp_path: Path) -> None:
    changes = (
        "seed=7 compile.distill.rank=3 compile.backends=[bias] verify.gates.kl_remaining=.05 validate.layers=[3,1]"
    )
    found = read(tmp_path, GOOD, *changes.split())
    assert (found.seed, found.compile.distill.rank, found.compile.backends) == (7, 3, ("bias",))
    assert found.verify.gates.kl_remaining == 0.05
    assert found.validate_.layers == (3, 1)
    assert found.compile.distill.learning_rate == 1e-5, "its neighbours stay"


def test_a_value_set_may_hold_an_equals_sign(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "ask=Is a=b?").ask == "Is a=b?"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed", "needed: key.to.set=value"),
        ("=3", "needed: key.to.set=value"),
        ("seed=[1", "the value is not valid YAML"),
        ("model.name=3", "'model' is a value, not a section"),
        ("sed=3", "sed: unknown key; did you mean 'seed'?"),
        ("compile.distill.epoch=3", "compile.distill.epoch: unknown key; did you mean 'epochs'?"),
        ("seed=x", "seed: found 'x'; input should be a valid integer"),
        ("folder=/tmp", "folder: unknown key"),
        (
            "data.kind=songs",
            "tiny.yaml: data.kind: found 'songs'; needed: 'pairs', 'choices', 'instructions', 'generated'.",
        ),
        ("validate.score.kind=vibes", "tiny.yaml: validate.score.kind: found 'vibes'; needed: 'keywords', "),
        ("data.test=3", "tiny.yaml: data.test: found 3; input is not a valid path"),
        ("data.test={split: train}", "tiny.yaml: data.test.source: missing."),
        ("data.generate={tries: 2}", "tiny.yaml: data.generate: unknown key; known here: "),
    ],
)
def test_a_bad_set_is_refused(tmp_path: Path, change: str, message: str) -> None:
    assert message in "\n".join(problems(tmp_path, GOOD, change))


def test_the_resolved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    found = read(tmp_path)
    again = read(tmp_path, found.resolved())
    assert again == found
    assert "folder" not in found.resolved()


def test_the_hash_follows_every_setting_but_not_the_folder(tmp_path: Path) -> None:
    found = read(tmp_path)
    (tmp_path / "other").mkdir()
    assert read(tmp_path / "other", GOOD).hash == found.hash
    assert read(tmp_path, GOOD + "seed: 0  # the default\n").hash == found.hash
    changed = {read(tmp_path, GOOD, change).hash for change in ("seed=1", "verify.gates.top1=.9", "ask=Who?")}
    assert len(changed | {found.hash}) == 4


def test_a_part_holds_the_named_sections_alone(tmp_path: Path) -> None:
    found = read(tmp_path).part("extract", "validate")
    assert list(found) == ["extract", "validate"]
    assert found["validate"]["score"] == {"kind": "length", "min_words": 1, "max_words": 12}


def test_the_shipped_recipes_can_be_read() -> None:
    assert SHIPPED
    for path in SHIPPED:
        recipe = read_recipe(path)
        assert min(len(recipe.data.read(recipe.folder).split(name)) for name in SPLITS) >= 16


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_rewritten_recipe_is_the_changed_one_with_its_comments(tmp_path: Path, path: Path) -> None:
    changes = ["name=other", "extract={method: pca}", "validate.layers=[3, 4]", "seed=7"]
    new = tmp_path / "other.yaml"
    new.write_text(rewritten(path, changes), encoding="utf-8")
    assert read_recipe(new).hash == read_recipe(path, changes).hash != read_recipe(path).hash
    assert new.read_text().splitlines()[0] == path.read_text().splitlines()[0]
    for kept in ("'", '"', "#"):
        before, after = (text.count(kept) for text in (path.read_text(), new.read_text()))
        assert after >= before / 2, f"{kept} is kept outside of what was changed"
