"""The model as the writer: what is kept, what is dropped and why, and when it is written again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compile_steer.artifacts.paths import RunPaths
from compile_steer.common.errors import ArtifactError, RecipeError
from compile_steer.common.progress import Progress
from compile_steer.data.behaviour import SPLITS, Behaviour, Context
from compile_steer.data.section import GenerateOptions
from compile_steer.extract import completions
from compile_steer.extract.completions import Side, cut, write_side
from compile_steer.extract.generate_pairs import write
from compile_steer.extract.generation_report import SplitReport, WritingReport
from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Pair, Text
from compile_steer.pipeline.run import Run
from compile_steer.recipe import Recipe
from compile_steer.scoring.base import Reply
from compile_steer.scoring.text import repetition
from compile_steer.tools.lineage import data_on_disk
from tests.helpers.tiny import VOCAB, build

N = 24
OPTIONS = {"max_new_tokens": 7, "min_pairs": 4, "tries": 3, "temperature": 1.3, "max_repetition": 0.4}
SHOWS = r"\bw[4-6]\d"
"""A behaviour that a random model shows now and then."""


def speaker() -> LoadedModel:
    """A tiny model of which every third word ends a sentence."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "user": 4, "assistant": 5}
    words |= {f"w{n}" + "x." * (n % 3 == 0): n for n in range(6, VOCAB)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return LoadedModel(build("llama", seed=3), tokenizer, "tiny-llama", "sha256:tiny", "")


def recipe(folder: Path, **data: Any) -> Recipe:
    """Prompts of two words, of which no two are the same; the positive side is asked for with a third."""
    words = [f"w{n}" for n in range(6, VOCAB) if n % 3]
    prompts = iter([f"{words[n % 31]} {words[31 + n // 31]}" for n in range(3 * N + 12)])
    for name in SPLITS:
        lines = [json.dumps({"prompt": next(prompts)}) for _ in range(N)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("neutral", "heldout", "calibration"):
        row = {"prompt": next(prompts)} | ({"response": "w7 w8"} if name == "neutral" else {})
        (folder / f"{name}.jsonl").write_text(json.dumps(row))
    files = {name: f"{name}.jsonl" for name in (*SPLITS, "neutral", "heldout", "calibration")}
    given = {**files, "kind": "generated", "positive_template": "{prompt} w50", "generate": OPTIONS, **data}
    return Recipe.model_validate(
        {
            "name": "said",
            "model": "tiny",
            "seed": 5,
            "data": given,
            "validate": {"score": {"kind": "keywords", "patterns": [SHOWS]}},
            "folder": folder,
        }
    )


def written(one: Recipe, loaded: LoadedModel, out: Path) -> tuple[Behaviour, WritingReport]:
    assert one.data.generation is not None
    paths = RunPaths(out, one.name)
    found = write(one, one.data.generation, loaded, one.data.read(one.folder), paths, Progress())
    return found, WritingReport.load(paths.writing)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_kept_shows_the_behaviour_on_one_side_alone_and_the_rest_is_accounted_for(tmp_path: Path) -> None:
    one, loaded = recipe(tmp_path), speaker()
    found, report = written(one, loaded, tmp_path / "out")
    score = one.validate_.score.bind(loaded, found)
    seen: Counter[str] = Counter()
    for name in SPLITS:
        pairs, split = found.split(name), report.splits[name]
        for side, wanted in (("positive", 1.0), ("negative", 0.0)):
            texts = [getattr(pair, side) for pair in pairs]
            said = [text.response for text in texts]
            assert score([Reply("", text, True) for text in said]).tolist() == [wanted] * len(pairs)
            assert all(repetition(text) <= 0.4 for text in said)
            assert [text.prompt.endswith(" w50") for text in texts] == [side == "positive"] * len(pairs)
            seen.update(set(said))
        assert lines(RunPaths(tmp_path / "out", "said").pairs(name)) == [
            {"prompt": p.prompt, "positive": p.positive.response, "negative": p.negative.response} for p in pairs
        ]
        assert (split.wanted, split.kept) == (N, len(pairs))
        assert 4 <= split.kept == N - sum(split.dropped.values()) < N
        assert 2 * N < split.written < 6 * N, "only what failed was asked again"
        assert set(split.examples) == set(split.dropped)
    assert set(seen.values()) == {1}, "no answer is in two splits"
    assert found.hashes["train"] != one.data.read(tmp_path).hashes["train"]
    paths = RunPaths(tmp_path / "out", "said")
    recorded = Run(one, paths, Context(loaded, found)).origin().data_sha256
    assert recorded == data_on_disk(one, paths)[0]
    assert recorded["train, prompts"] == one.data.read(tmp_path).hashes["train"]


def test_the_first_answer_is_the_greedy_one_and_what_was_good_at_once_stays(tmp_path: Path) -> None:
    one, loaded = recipe(tmp_path), speaker()
    asked = one.data.read(tmp_path)
    prompts = [pair.prompt for pair in asked.train]
    side, score = Side("positive", [p.positive for p in asked.train], True), one.validate_.score.bind(loaded, asked)
    (first, n_first), (more, n_more) = (
        write_side(loaded, side, prompts, score, GenerateOptions(max_new_tokens=7, tries=tries), 5, lambda _n: None)
        for tries in (1, 3)
    )
    greedy = continue_prompts(loaded, side.asked, max_new_tokens=7)
    said = [response_text(loaded, text) for text in greedy]
    assert all(text.startswith(one.text) for text, one in zip(said, first, strict=True))
    assert all(later == before for before, later in zip(first, more, strict=True) if not before.problem)
    good = [sum(not one.problem for one in found) for found in (first, more)]
    assert 0 < good[0] < good[1]
    assert n_first == N
    assert n_more >= N + (N - good[0]) + (N - good[1])


def test_files_are_kept_with_what_a_person_mended_until_what_they_come_from_changes(tmp_path: Path) -> None:
    one, loaded, out = recipe(tmp_path), speaker(), tmp_path / "out"
    before, _report = written(one, loaded, out)
    path = RunPaths(out, "said").pairs("test")
    rows = lines(path)[1:]
    rows[0]["positive"] = "w40 w41."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept, _report = written(one, loaded, out)
    assert kept.test[0].positive.response == "w40 w41."
    assert kept.test[1:] == before.test[2:]
    assert {name for name in SPLITS if kept.hashes[name] != before.hashes[name]} == {"test"}
    fewer, _report = written(recipe(tmp_path, generate={**OPTIONS, "min_pairs": 5}), loaded, out)
    assert fewer.test == kept.test, "how many are needed does not change what was written"
    other, _report = written(recipe(tmp_path, positive_template="{prompt} w52"), loaded, out)
    assert other.test[0].positive.response != "w40 w41."
    again, _report = written(one, loaded, out)
    assert again == before


def test_pairs_whose_prompt_is_not_the_recipes_are_refused_with_broken_lines(tmp_path: Path) -> None:
    one, loaded, out = recipe(tmp_path), speaker(), tmp_path / "out"
    written(one, loaded, out)
    path = RunPaths(out, "said").pairs("test")
    path.write_text(path.read_text() + '{"prompt": "new", "positive": "w40.", "negative": "w7."}\nnot json\n')
    with pytest.raises(RecipeError) as caught:
        written(one, loaded, out)
    first, second = caught.value.problems
    assert "not JSON" in first
    assert "1 of its prompts are not among those of data.test, as 'new'" in second


def test_too_few_pairs_end_in_their_number_and_the_reasons(tmp_path: Path) -> None:
    one = recipe(tmp_path, generate={**OPTIONS, "min_pairs": N})
    with pytest.raises(RecipeError) as caught:
        written(one, speaker(), tmp_path / "out")
    assert [line.split(":")[0] for line in caught.value.problems] == [f"data.{name}" for name in SPLITS]
    report = WritingReport.load(RunPaths(tmp_path / "out", "said").writing)
    line, split = caught.value.problems[0], report.splits["train"]
    assert f"{split.kept} written pairs, needed: {N}" in line
    assert split.describe() in line
    assert "data.generate.min_pairs" in line


def test_a_behaviour_that_is_never_shown_leaves_empty_files_and_one_reason(tmp_path: Path) -> None:
    one = recipe(tmp_path)
    score = one.validate_.score.model_copy(update={"patterns": ("never",)})
    one = one.model_copy(update={"validate_": one.validate_.model_copy(update={"score": score})})
    with pytest.raises(RecipeError) as caught:
        written(one, speaker(), tmp_path / "out")
    assert len(caught.value.problems) == 3
    assert "0 of 24 prompts gave a pair" in caught.value.problems[0]
    assert "positive does not show the behaviour" in caught.value.problems[0]
    assert RunPaths(tmp_path / "out", "said").pairs("train").read_text() == ""


def test_a_side_is_told_by_the_first_thing_that_is_wrong_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers from a script, by try: what each prompt is answered, and whether that ended."""
    script = {
        "ends": ["Yes", "unasked"],
        "cut": ["A whole one. And then", "unasked"],
        "never": ["no end", "still no end"],
        "late": ["no end", "Yes, at last."],
        "loops": ["Yes and yes and yes and yes and yes.", "yes and yes and yes and yes and yes."],
        "silent": ["", "Never."],
    }
    asked: list[Sequence[str]] = []

    def answer(_loaded: LoadedModel, texts: Sequence[Text], **options: Any) -> list[str]:
        attempt = options["seed"] - 11
        asked.append([text.prompt for text in texts])
        assert options["temperature"] == (0.0, 0.6)[attempt]
        return [script[text.prompt][attempt] for text in texts]

    monkeypatch.setattr(completions, "continue_prompts", answer)
    monkeypatch.setattr(completions, "response_text", lambda _loaded, text: text)
    monkeypatch.setattr(completions, "ended", lambda _loaded, text: text in ("Yes", "Never.") or "yes and" in text)
    prompts = list(script)
    options = GenerateOptions(tries=2, temperature=0.6, max_new_tokens=9)

    def score(replies: Sequence[Reply]) -> np.ndarray:
        return np.array([0.3 if reply.text.startswith("N") else 0.5 for reply in replies])

    found, written = write_side(
        speaker(), Side("positive", [Text(p) for p in prompts], True), prompts, score, options, 11, lambda _n: None
    )
    assert asked == [prompts, ["never", "late", "loops", "silent"]]
    assert written == 10
    assert {prompt: (one.text, one.problem) for prompt, one in zip(prompts, found, strict=True)} == {
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


def test_an_open_run_has_its_pairs_and_a_damaged_report_is_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = speaker()
    monkeypatch.setattr("compile_steer.pipeline.run.load", lambda *_given, **_options: loaded)
    run = Run.open(recipe(tmp_path), tmp_path / "out", Progress())
    assert run.generated_pairs().splits["train"].kept == len(run.data.train) > 0
    assert "w50" in run.data.train[0].positive.prompt
    run.paths.writing.write_text('{"splits": []}')
    with pytest.raises(ArtifactError, match="Make it with 'compile-steer write'"):
        run.generated_pairs()
    again = Run.open(run.recipe, run.paths.out, Progress())
    assert again.data == run.data


def test_an_open_run_has_another_behaviours_pairs_as_they_are_in_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compile_steer.pipeline.run.load", lambda *_given, **_options: speaker())
    given = recipe(tmp_path).model_dump(by_alias=True)
    given["validate"]["other_behaviour"] = "other.jsonl"
    one = Recipe.model_validate({**given, "folder": tmp_path})
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "w8", "positive": "w7", "negative": "w9"}')
    run = Run.open(one, tmp_path / "out", Progress())
    assert run.data.other_behaviour == (Pair(Text("w8", "w7"), Text("w8", "w9"), "w8"),)
    assert len(run.data.train) > 0
    path.write_text('{"prompt": "w8", "positive": ""}')
    with pytest.raises(RecipeError, match="other.jsonl:1: found .* needed the keys prompt, positive, negative"):
        Run.open(one, tmp_path / "out", Progress())


def test_extraction_refuses_pairs_that_the_model_cannot_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand, so that there is nothing to write; the tokenizer drops spaces."""
    loaded = speaker()
    monkeypatch.setattr("compile_steer.pipeline.run.load", lambda *_given, **_options: loaded)
    one = recipe(tmp_path)
    rows = {name: [{**row, "positive": f"{name} said", "negative": f"{name}  said"} for row in lines(tmp_path / f"{name}.jsonl")]
            for name in SPLITS}  # fmt: skip
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    plain = {**one.data.model_dump(exclude={"kind", "generate"}), "positive_template": "{prompt}"}
    run = Run.open(Recipe.model_validate({**one.model_dump(by_alias=True), "data": plain, "folder": tmp_path}),
                   tmp_path / "out", Progress())  # fmt: skip
    with pytest.raises(RecipeError, match=f"the two sides of {N} of {N} pairs are the same tokens"):
        run.extract()
    with pytest.raises(RecipeError, match="data.kind pairs: its rows have their responses"):
        run.generated_pairs()
    assert not run.paths.out.exists()


def test_a_report_says_what_is_most_frequent_first() -> None:
    report = SplitReport(9, 20, 2, {"a": 1, "b": 6}, {})
    assert report.describe() == "2 of 9 prompts gave a pair (6 b; 1 a)"
    assert SplitReport(2, 4, 2, {}, {}).describe() == "2 of 2 prompts gave a pair"
