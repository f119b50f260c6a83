"""Pairs that the model generates: what is kept, what is dropped and why, and when they are generated again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS, Context
from compile_steer.data.section import GenerateOptions
from compile_steer.extraction.generate_pairs import (
    GenerationReport,
    SplitReport,
    cut,
    generate_pairs,
    generate_side,
)
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.scoring.base import Reply
from compile_steer.scoring.text import repetition
from tests.helpers.generation import N_PROMPTS, OPTIONS, generated, generating_model, generating_recipe, read_rows


def test_kept_pairs_show_the_behaviour_on_the_positive_side_alone_and_every_dropped_prompt_has_a_reason(
    tmp_path: Path,
) -> None:
    recipe, model = generating_recipe(tmp_path), generating_model()
    data, report = generated(recipe, model, tmp_path / "out")
    score = recipe.validate_.score.bind(model, data)
    n_splits: Counter[str] = Counter()
    for name in SPLITS:
        pairs, split = data.split(name), report.splits[name]
        for side, expected in (("positive", 1.0), ("negative", 0.0)):
            texts = [getattr(pair, side) for pair in pairs]
            responses = [text.response for text in texts]
            assert score([Reply("", text, True) for text in responses]).tolist() == [expected] * len(pairs)
            assert all(repetition(text) <= 0.4 for text in responses)
            assert [text.prompt.endswith(" w50") for text in texts] == [side == "positive"] * len(pairs)
            n_splits.update(set(responses))
        assert read_rows(RunPaths(tmp_path / "out", "generated").pairs(name)) == [
            {"prompt": p.prompt, "positive": p.positive.response, "negative": p.negative.response} for p in pairs
        ]
        assert (split.prompts, split.kept) == (N_PROMPTS, len(pairs))
        assert 4 <= split.kept == N_PROMPTS - sum(split.dropped.values()) < N_PROMPTS
        assert 2 * N_PROMPTS < split.generated < 6 * N_PROMPTS, "only what failed is tried again"
        assert set(split.examples) == set(split.dropped)
    assert set(n_splits.values()) == {1}, "no response is in two splits"


def test_the_first_try_is_greedy_and_what_was_usable_at_once_stays(tmp_path: Path) -> None:
    recipe, model = generating_recipe(tmp_path), generating_model()
    prompts = recipe.data.read(tmp_path)
    score = recipe.validate_.score.bind(model, prompts)
    (first, n_first), (more, n_more) = (
        generate_side(
            model,
            "positive",
            prompts.train,
            score,
            GenerateOptions(max_new_tokens=7, tries=tries),
            5,
            lambda _n: None,
        )
        for tries in (1, 3)
    )
    greedy = continue_prompts(model, [pair.positive for pair in prompts.train], max_new_tokens=7)
    responses = [response_text(model, text) for text in greedy]
    assert all(text.startswith(completion.text) for text, completion in zip(responses, first, strict=True))
    assert all(later == before for before, later in zip(first, more, strict=True) if not before.problem)
    usable = [sum(not completion.problem for completion in completions) for completions in (first, more)]
    assert 0 < usable[0] < usable[1]
    assert n_first == N_PROMPTS
    assert n_more >= N_PROMPTS + (N_PROMPTS - usable[0]) + (N_PROMPTS - usable[1])


def test_files_are_kept_with_their_edits_until_their_inputs_change(tmp_path: Path) -> None:
    recipe, model, out = generating_recipe(tmp_path), generating_model(), tmp_path / "out"
    before, _report = generated(recipe, model, out)
    path = RunPaths(out, "generated").pairs("test")
    rows = read_rows(path)[1:]
    rows[0]["positive"] = "w40 w41."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept, _report = generated(recipe, model, out)
    assert kept.test[0].positive.response == "w40 w41."
    assert kept.test[1:] == before.test[2:]
    assert {name for name in SPLITS if kept.hashes[name] != before.hashes[name]} == {"test"}
    fewer, _report = generated(generating_recipe(tmp_path, generate={**OPTIONS, "min_pairs": 5}), model, out)
    assert fewer.test == kept.test, "how many are needed does not change what is generated"
    other, _report = generated(generating_recipe(tmp_path, positive_template="{prompt} w52"), model, out)
    assert other.test[0].positive.response != "w40 w41."
    again, _report = generated(recipe, model, out)
    assert again == before


def test_generated_pairs_are_what_their_files_say(tmp_path: Path) -> None:
    recipe, model, paths = generating_recipe(tmp_path), generating_model(), RunPaths(tmp_path / "out", "generated")
    assert recipe.data.generation is not None
    context = Context(model, recipe.data.read(tmp_path), recipe.seed)
    rows, splits = generate_pairs(context, recipe.data.generation, recipe.validate_.score)
    _data, report = generated(recipe, model, paths.out)
    assert report.splits == splits
    assert {name: read_rows(paths.pairs(name)) for name in SPLITS} == rows


def test_pairs_of_unknown_prompts_and_broken_lines_are_refused_together(tmp_path: Path) -> None:
    recipe, model, out = generating_recipe(tmp_path), generating_model(), tmp_path / "out"
    generated(recipe, model, out)
    path = RunPaths(out, "generated").pairs("test")
    path.write_text(path.read_text() + '{"prompt": "new", "positive": "w40.", "negative": "w7."}\nnot json\n')
    with pytest.raises(RecipeError) as caught:
        generated(recipe, model, out)
    first, second = caught.value.problems
    assert "not JSON" in first
    assert "1 of its prompts are not among those of data.test, for example 'new'" in second


def test_too_few_pairs_are_reported_with_their_number_and_the_reasons(tmp_path: Path) -> None:
    recipe = generating_recipe(tmp_path, generate={**OPTIONS, "min_pairs": N_PROMPTS})
    with pytest.raises(RecipeError) as caught:
        generated(recipe, generating_model(), tmp_path / "out")
    assert [line.split(":")[0] for line in caught.value.problems] == ["data.train"], "no other split was generated"
    path = RunPaths(tmp_path / "out", "generated").generation_report
    line, split = caught.value.problems[0], GenerationReport.load(path).splits["train"]
    assert f"found {split.kept} generated pairs; needed: {N_PROMPTS}" in line
    assert split.describe() in line
    assert str(path) in line
    assert "data.generate.min_pairs" in line


def test_a_behaviour_that_is_never_shown_leaves_empty_files_and_one_reason(tmp_path: Path) -> None:
    recipe = generating_recipe(tmp_path)
    score = recipe.validate_.score.model_copy(update={"patterns": ("never",)})
    recipe = recipe.model_copy(update={"validate_": recipe.validate_.model_copy(update={"score": score})})
    with pytest.raises(RecipeError) as caught:
        generated(recipe, generating_model(), tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert "0 of 24 prompts gave a pair" in caught.value.problems[0]
    assert "positive does not show the behaviour" in caught.value.problems[0]
    assert RunPaths(tmp_path / "out", "generated").pairs("train").read_text() == ""


def test_a_response_is_dropped_for_the_first_problem_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses from a script, by try: what each prompt gets, and whether that ended."""
    script = {
        "ends": ["Yes", "not tried"],
        "cut": ["A whole one. And then", "not tried"],
        "never": ["no end", "still no end"],
        "late": ["no end", "Yes, at last."],
        "loops": ["Yes and yes and yes and yes and yes.", "yes and yes and yes and yes and yes."],
        "silent": ["", "Never."],
    }
    tried: list[Sequence[str]] = []

    def respond(_loaded: LoadedModel, texts: Sequence[Text], **options: Any) -> list[str]:
        attempt = options["seed"] - 11
        tried.append([text.prompt for text in texts])
        assert options["temperature"] == (0.0, 0.6)[attempt]
        return [script[text.prompt][attempt] for text in texts]

    def score(replies: Sequence[Reply]) -> np.ndarray:
        return np.array([0.3 if reply.text.startswith("N") else 0.5 for reply in replies])

    module = "compile_steer.models.generate"
    monkeypatch.setattr(f"{module}.continue_prompts", respond)
    monkeypatch.setattr(f"{module}.response_text", lambda _loaded, text: text)
    monkeypatch.setattr(f"{module}.ended", lambda _loaded, text: text in ("Yes", "Never.") or "yes and" in text)
    pairs = [Pair(Text(prompt), Text("not read"), prompt) for prompt in script]
    options = GenerateOptions(tries=2, temperature=0.6, max_new_tokens=9)
    completions, n_generated = generate_side(generating_model(), "positive", pairs, score, options, 11, lambda _n: None)
    assert tried == [list(script), ["never", "late", "loops", "silent"]]
    assert n_generated == 10
    assert {prompt: (c.text, c.problem) for prompt, c in zip(script, completions, strict=True)} == {
        "ends": ("Yes", ""),
        "cut": ("A whole one.", ""),
        "never": ("still no end", "positive: no whole sentence within 9 tokens"),
        "late": ("Yes, at last.", ""),
        "loops": (script["loops"][1], "positive repeats itself"),
        "silent": ("Never.", "positive does not show the behaviour"),
    }


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("One. Two", "One."),
        ('He said "no!" and', 'He said "no!"'),
        ("first line\nsecond li", "first line"),
        ("1. Wash it.\n2. Dry it.\n3.", "1. Wash it.\n2. Dry it."),
        ("It costs 3.50 in al", ""),
        ("Wait... what", "Wait..."),
        ("no end", ""),
    ],
)
def test_a_text_that_was_stopped_ends_with_its_last_whole_sentence(text: str, whole: str) -> None:
    assert cut(text) == whole


def test_a_report_gives_the_most_frequent_reason_first() -> None:
    report = SplitReport(9, 20, 2, {"a": 1, "b": 6}, {})
    assert report.describe() == "2 of 9 prompts gave a pair (6 b; 1 a)"
    assert SplitReport(2, 4, 2, {}, {}).describe() == "2 of 2 prompts gave a pair"
