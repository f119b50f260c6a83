"""Contrast pairs in memory: how they are made, what is refused, and how they become all data of a behaviour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.encoding import check_texts
from compile_steer.data.pairs import Pairs
from compile_steer.models.text import Pair, Text
from tests.helpers.extraction import extract_with
from tests.helpers.tiny import LAYERS, loaded

ROWS = [(f"prompt {n}", f"high {n}", f"low {n}") for n in range(40)]
NEUTRAL = [Text("control 0", "plain"), Text("control 1", "text")]


def problems(rows: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Pairs.from_list(rows)
    return list(caught.value.problems)


# --------------------------------------------------------------------------------------- making pairs


def test_tuples_dicts_and_pairs_make_the_same_pairs(tmp_path: Path) -> None:
    pairs = Pairs.from_list(ROWS)
    dicts = [{"prompt": prompt, "positive": high, "negative": low} for prompt, high, low in ROWS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in dicts))
    assert pairs[3] == Pair(Text("prompt 3", "high 3"), Text("prompt 3", "low 3"), "prompt 3")
    assert Pairs.from_list(dicts) == Pairs.from_list(list(pairs)) == Pairs.from_file(tmp_path / "pairs.jsonl") == pairs


def test_pairs_are_a_sequence() -> None:
    pairs = Pairs.from_list(ROWS)
    assert (len(pairs), len(list(pairs)), pairs[0] in pairs) == (40, 40, True)
    assert pairs[5:7] == Pairs.from_list(ROWS[5:7])
    assert repr(pairs[1:]) == "Pairs(n=39, first: 'prompt 1' -> 'high 1' / 'low 1')"
    assert repr(pairs[:0]) == "Pairs(n=0)"
    assert len(repr(Pairs.from_list([("p" * 400, "q" * 400, "r" * 400)]))) < 160


def test_columns_of_a_table_become_pairs() -> None:
    table = [{"question": p, "chosen": high, "rejected": low, "score": n} for n, (p, high, low) in enumerate(ROWS)]
    columns = {"prompt": "question", "positive": "chosen", "negative": "rejected"}
    assert Pairs.from_dataset(table, **columns) == Pairs.from_list(ROWS)
    with pytest.raises(RecipeError) as caught:
        Pairs.from_dataset([*table, {"question": "a"}, {"question": "b", "chosen": "c", "rejected": 3}], **columns)
    assert caught.value.problems == (
        "row 40: found the columns ['question']; needed question, chosen, rejected.",
        "row 41: negative must be text that is not empty and holds no NUL.",
    )


def test_a_data_set_of_the_library_is_a_table() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["a", "b"], "positive": ["c", "d"], "negative": ["e", "f"]})
    assert Pairs.from_dataset(table) == Pairs.from_list([("a", "c", "e"), ("b", "d", "f")])


# ------------------------------------------------------------------------------------- what is refused


def test_every_problem_of_every_row_is_reported_at_once() -> None:
    rows = [
        ("a", "b", "c"),
        ("d", "e"),
        {"prompt": "f", "positive": "g"},
        ("h", "", 3),
        (" A ", "i", "j"),
        ("k", "same", "same "),
        Pair(Text("l", "m"), Text("l", "m"), "l"),
        "text",
    ]
    assert problems(rows) == [
        "row 1: found tuple; needed the keys prompt, positive, negative.",
        "row 2: found ['positive', 'prompt']; needed the keys prompt, positive, negative.",
        "row 3: positive, negative must be text that is not empty and holds no NUL.",
        "row 4: the prompt ' A ' is in row 0 too.",
        "row 5: positive and negative are the same text, 'same'.",
        "row 6: positive and negative are the same text, 'm'.",
        "row 7: found str; needed the keys prompt, positive, negative.",
    ]


def test_sides_with_the_same_response_to_other_prompts_are_a_pair() -> None:
    pair = Pair(Text("a, in song", "b"), Text("a", "b"), "a")
    assert Pairs.from_list([pair])[0] == pair


def test_many_problems_are_counted_and_no_pairs_are_a_problem() -> None:
    assert problems([("a", "b")] * 15)[-1] == "5 more like this."
    assert problems([]) == ["found 0 pairs; needed: 1 or more."]


def test_problems_of_a_file_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "positive": "b", "negative": "c"}\n\n{"prompt": "d"}\nnot json\n')
    with pytest.raises(RecipeError) as caught:
        Pairs.from_file(path)
    assert caught.value.problems == (
        "pairs.jsonl:4: not JSON (column 2: expected ident).",
        "pairs.jsonl:3: found ['prompt']; needed the keys prompt, positive, negative.",
    )
    with pytest.raises(RecipeError, match="nowhere.jsonl cannot be read"):
        Pairs.from_file(tmp_path / "nowhere.jsonl")


# ------------------------------------------------------------------------------------------- splits


def test_splits_are_disjoint_whole_and_the_same_for_a_seed() -> None:
    pairs = Pairs.from_list(ROWS)
    parts = pairs.split(0.5, 0.3, 0.2, seed=4)
    assert [len(part) for part in parts] == [20, 12, 8]
    assert sorted(pair.prompt for part in parts for pair in part) == sorted(pair.prompt for pair in pairs)
    assert all(list(part) == [pair for pair in pairs if pair in part] for part in parts), "in the pairs' own order"
    assert parts == pairs.split(0.5, 0.3, 0.2, seed=4) != pairs.split(0.5, 0.3, 0.2, seed=5)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.0, 0.2, -0.2), (0.6, 0.4, 0.0)])
def test_fractions_that_do_not_add_up_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(RecipeError, match="needed: all above 0, with the sum 1"):
        Pairs.from_list(ROWS).split(*fractions)


def test_too_few_pairs_for_three_parts_are_refused() -> None:
    with pytest.raises(RecipeError, match="2 pairs give 1 for train, 1 for validation, 0 for test; needed: 1 or more"):
        Pairs.from_list(ROWS[:2]).split()


# ---------------------------------------------------------------------------------------- behaviours


def test_a_behaviour_has_the_texts_that_are_given_and_all_pairs() -> None:
    pairs = Pairs.from_list(ROWS)
    data = pairs.to_behaviour(neutral=NEUTRAL, heldout=["what is rain?"], calibration=[Text("who?")], seed=2)
    assert sorted(p.prompt for p in (*data.train, *data.validation, *data.test)) == sorted(p.prompt for p in pairs)
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 8, 8)
    assert data.neutral == tuple(NEUTRAL)
    assert (data.heldout, data.calibration) == ((Text("what is rain?"),), (Text("who?"),))
    assert set(data.hashes) == {"train", "validation", "test", "neutral", "heldout", "calibration"}
    other = pairs.to_behaviour(neutral=NEUTRAL, heldout=["what is snow?"], calibration=[Text("who?")], seed=2)
    assert {name for name in data.hashes if data.hashes[name] != other.hashes[name]} == {"heldout"}


def test_missing_texts_are_those_of_the_package_but_for_prompts_that_a_pair_has() -> None:
    general = Pairs.from_list(ROWS).to_behaviour()
    assert min(len(general.neutral), len(general.heldout), len(general.calibration)) >= 30
    assert all(text.response for text in general.neutral)
    prompts = [text.prompt for text in (*general.neutral, *general.heldout, *general.calibration)]
    assert len(set(prompts)) == len(prompts), "each prompt is in one part"
    prompt = general.heldout[3].prompt
    rows = [*ROWS, (prompt.upper(), "high", "low"), (general.calibration[0].prompt, "higher", "lower")]
    data = Pairs.from_list(rows).to_behaviour(neutral=NEUTRAL)
    assert data.neutral == tuple(NEUTRAL)
    assert data.heldout == tuple(text for text in general.heldout if text.prompt != prompt)
    assert data.calibration == general.calibration[1:]


def test_a_plain_control_text_is_divided_into_a_prompt_and_its_continuation() -> None:
    data = Pairs.from_list(ROWS).to_behaviour(neutral=["the way to the old town is long"])
    assert data.neutral == (Text("the way to the", "old town is long"),)


def test_texts_that_cannot_be_used_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Pairs.from_list(ROWS).to_behaviour(neutral=["one"], heldout=["Prompt  3", " "], calibration=[])
    assert caught.value.problems == (
        "neutral, text 0: found 'one'; needed: a prompt and a response; of a plain string, two words.",
        "heldout, text 1: found ' '; needed: a prompt.",
        "calibration: found 0 texts; needed: 1 or more, or leave it out to take the package's own.",
        "data: the prompt 'Prompt  3' is in both pairs and heldout; the splits must not overlap.",
    )


def test_a_direction_can_be_extracted_from_pairs_alone() -> None:
    tiny = loaded("llama")
    pairs = Pairs.from_list([(f"w{n} w60", f"w4{n % 7} w50", f"w9{n % 3}") for n in range(10, 40)])
    data = pairs.to_behaviour()
    check_texts(tiny, data)
    directions = extract_with(tiny, data, length="stream")
    assert directions.layers == tuple(range(LAYERS))
