"""Kinds of data other than pairs as they stand: multiple choice, instructions, prompts to be answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import SPLITS, Behaviour, Check, Question
from compile_steer.data.encoding import check_texts
from compile_steer.data.kinds import ChoicesData, GeneratedData, InstructionsData, PairsData
from compile_steer.data.section import DataSection
from compile_steer.data.shapes import unbalanced
from compile_steer.data.templates import fill
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import encode, prompt_text
from tests.helpers.tiny import chat_tokenizer, loaded, tokenizer

Row = dict[str, Any]
OTHERS: dict[str, list[Row]] = {
    "neutral": [{"prompt": "neutral 0", "response": "plain"}],
    "heldout": [{"prompt": "heldout 0"}],
    "calibration": [{"prompt": "calibration 0"}],
}


def read(folder: Path, kind: type[DataSection], rows: dict[str, list[Row]], **options: Any) -> Behaviour:
    for name, content in {**OTHERS, **rows}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    files = {name: f"{name}.jsonl" for name in (*SPLITS, *OTHERS)}
    return kind.model_validate({"kind": kind.__name__.removesuffix("Data").lower(), **files, **options}).read(folder)


def problems(folder: Path, kind: type[DataSection], rows: dict[str, list[Row]], **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, kind, rows, **options)
    return list(caught.value.problems)


# ----------------------------------------------------------------------------------- multiple choice


def quiz() -> dict[str, list[Row]]:
    """Twelve questions of five choices a split; the right one is number 0, 1, 2, 3, 4, 0, ..."""
    return {
        name: [
            {"question": f"{name} {n}?", "choices": [f"{c}{n}" for c in "pqrst"], "answer": n % 5} for n in range(12)
        ]
        for name in SPLITS
    }


def test_a_question_becomes_a_prompt_with_letters_and_a_pair_of_letters(tmp_path: Path) -> None:
    rows = quiz()
    rows["test"][1] = {"question": "Which {choices}?", "choices": ["none", " both", "{question}"], "answer": "both "}
    data = read(tmp_path, ChoicesData, rows, question_template="Q: {question}\n{choices}\nLetter:")
    prompt = "Q: Which {choices}?\nA. none\nB.  both\nC. {question}\nLetter:"
    pair = data.test[1]
    assert (pair.prompt, pair.positive) == (prompt, Text(prompt, "B"))
    assert pair.negative.prompt == prompt
    assert pair.negative.response in {"A", "C"}
    assert data.questions[prompt] == Question(prompt, ("A", "B", "C"), 1, ("none", " both", "{question}"))
    assert len(data.questions) == 36
    assert data.train[7].positive.response == "C"


def test_a_wrong_letter_is_any_of_them_and_the_same_one_every_time(tmp_path: Path) -> None:
    data = read(tmp_path, ChoicesData, quiz())
    pairs = data.train + data.validation + data.test
    assert all(pair.negative.response != pair.positive.response for pair in pairs)
    assert {pair.negative.response for pair in pairs} == set("ABCDE")
    assert {pair.negative.response for pair in pairs if pair.positive.response == "A"} > {"B"}
    rows = quiz()
    rows["train"].reverse()
    again = {pair.prompt: pair for pair in read(tmp_path, ChoicesData, rows).train}
    assert [again[pair.prompt] for pair in data.train] == list(data.train)


def test_balanced_letters_turn_the_choices_and_keep_the_right_one(tmp_path: Path) -> None:
    rows = quiz()
    for row in rows["train"]:  # the answer is always A, by number or by text
        row["answer"] = 0 if row["question"].endswith("0?") else row["choices"][0]
    lines = problems(tmp_path, ChoicesData, rows, balance_letters=False)
    assert any("Leave out data.balance_letters" in line for line in lines)
    data = read(tmp_path, ChoicesData, rows)
    assert data == read(tmp_path, ChoicesData, rows, balance_letters=True)
    assert [note.partition(":")[0] for note in data.notes] == [
        "data.train"
    ] and "the choices were turned" in data.notes[0]
    assert [pair.positive.response for pair in data.train] == list("ABCDEABCDEAB")
    asked = [data.questions[pair.prompt] for pair in data.train]
    assert [question.choices[question.answer] for question in asked] == [f"p{n}" for n in range(12)]
    assert asked[1].choices == ("t1", "p1", "q1", "r1", "s1") and "B. p1" in asked[1].prompt


def letters(right: str, **row: str) -> list[dict[str, Any]]:
    """Rows of two choices whose right answers have these letters."""
    return [{"choices": ["x", row.get("other", f"y{n}")], "answer": "AB".index(one)} for n, one in enumerate(right)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (letters("AAABABAABAAAAABAAAAA"), True),
        (letters("ABABAABBAABABABBABAA"), False),
        (letters("AAA"), True),
        (letters("A"), False),
        (letters("AAAAAAAAAA", other="All of the above"), False),
        (letters("AAAAAAAAAA", other="Both A and B"), False),
        ([], False),
    ],
)
def test_letters_are_balanced_where_one_is_right_too_often(rows: list[dict[str, Any]], expected: bool) -> None:
    assert unbalanced(rows) is expected


def test_letters_as_responses_of_pairs_are_referred_to_choices(tmp_path: Path) -> None:
    rows = {name: [{"prompt": f"{name}?", "positive": "(A)", "negative": "(B)"}] for name in SPLITS}
    lines = problems(tmp_path, PairsData, rows)
    assert lines and all(line.endswith("Answers to multiple choice are read by data.kind: choices.") for line in lines)


def test_what_no_question_can_be_made_of_is_reported_at_once(tmp_path: Path) -> None:
    rows = quiz()
    rows["train"] = [{**row, "answer": 2} for row in rows["train"]]
    rows["validation"][0]["answer"] = 5
    rows["validation"][1]["answer"] = "nothing"
    rows["test"][0]["choices"] = ["same", "same"]
    rows["test"][1]["choices"] = "abc"
    rows["test"][2]["answer"] = True
    rows["test"][3] = {**rows["test"][4], "choices": rows["test"][4]["choices"][::-1]}
    lines = problems(tmp_path, ChoicesData, rows, question_template="{question} {question}", balance_letters=False)
    expected = [
        "test.jsonl:1: choices must be a list of 2 to 26 texts, no two the same",
        "test.jsonl:2: choices must be a list of 2 to 26 texts",
        "test.jsonl:3: answer must be the right choice's number, from 0 on, or its text",
        "data.test: the prompt 'test 4? | p4 | q4 | r4 | s4 | t4' occurs 2 times",
        "data.question_template '{question} {question}' must contain {question} exactly once",
        "data.question_template '{question} {question}' must contain {choices} exactly once",
        "data.train: the right answer is C in every row (12), so that the letter alone separates right from wrong",
        "data.validation: the answer of 2 of 12 rows is none of its choices, for example 5 of ['p0', 'q0', 'r0', 's0', 't0']",
    ]
    assert len(lines) == len(expected)
    for start, line in zip(expected, lines, strict=True):
        assert line.startswith(start)


# -------------------------------------------------------------------------------------- instructions


def asked() -> dict[str, list[Row]]:
    return {name: [{"prompt": f"{name} {n}", "instruction": "No commas."} for n in range(3)] for name in SPLITS}


def test_an_instruction_goes_after_the_prompt_of_one_side_and_its_checks_by_the_plain_prompt(tmp_path: Path) -> None:
    rows = asked()
    rows["train"][1]["checks"] = [
        {"id": "punctuation:no_comma"},
        {"id": "length:words", "arguments": {"relation": "at least", "n": 3, "other": None}},
    ]
    data = read(tmp_path, InstructionsData, rows)
    assert data.train[1] == Pair(Text("train 1 No commas."), Text("train 1"), "train 1")
    assert data.checks == {
        "train 1": (
            Check("punctuation:no_comma"),
            Check("length:words", (("n", 3), ("relation", "at least"))),
        )
    }
    rows["test"][0]["checks"] = [{"name": "no_comma"}]
    rows["test"][1]["instruction"] = ""
    lines = problems(tmp_path, InstructionsData, rows)
    assert lines == [
        'test.jsonl:1: checks must be a list of objects {"id": text, "arguments": {...}}.',
        "test.jsonl:2: instruction must be text that is not empty and holds no NUL.",
    ]


# ------------------------------------------------------------------------------------------- written


def plain() -> dict[str, list[Row]]:
    return {name: [{"prompt": f"{name} {n} {{prompt}}"} for n in range(3)] for name in SPLITS}


def test_prompts_get_the_template_of_either_side_and_system_prompt(tmp_path: Path) -> None:
    options = {"positive_template": "{prompt} Sing.", "positive_system": "A bard.", "negative_system": "A clerk."}
    data = read(tmp_path, GeneratedData, plain(), **options)
    prompt = "train 2 {prompt}"
    expected = Pair(Text(f"{prompt} Sing.", system="A bard."), Text(prompt, system="A clerk."), prompt)
    assert data.train[2] == expected


@pytest.mark.parametrize(
    ("options", "starts"),
    [
        (
            {},
            [
                "data: both sides have the same prompt, so the model would give both the same response. Set positive_template"
            ],
        ),
        ({"positive_template": ""}, ["data.positive_template '' must contain {prompt} exactly once"]),
        (
            {"positive_template": "Sing.", "negative_template": "Speak."},
            ["data.positive_template 'Sing.' must contain", "data.negative_template 'Speak.' must contain"],
        ),
    ],
)
def test_templates_that_give_both_sides_the_same_prompt_are_refused(
    tmp_path: Path, options: dict[str, str], starts: list[str]
) -> None:
    lines = problems(tmp_path, GeneratedData, plain(), **options)
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for start, line in zip(starts, lines, strict=True))


def test_a_template_fills_its_placeholders_in_one_pass_and_leaves_other_braces() -> None:
    assert fill("{a}: {b} {c} {", a="{b}", b="x") == "{b}: x {c} {"


# --------------------------------------------------------------------------------------------- model


def test_a_system_prompt_stands_before_the_conversation() -> None:
    talk = Text("w20", "w21", (("w30", "w31"),), system="w40")
    assert (
        prompt_text(chat_tokenizer(), talk)
        == "<s> system w40 <s> user w30 <s> assistant w31 <s> user w20 <s> assistant "
    )
    encoded = encode(chat_tokenizer(), talk)
    assert [chat_tokenizer().convert_ids_to_tokens(encoded.ids[n]) for n in range(*encoded.earlier[0])] == ["w31"]


def test_a_system_prompt_that_the_model_would_not_see_is_refused() -> None:
    with pytest.raises(RecipeError, match="a system prompt needs a model with a chat template"):
        encode(tokenizer(), Text("w20", system="w40"))
    deaf, strict = chat_tokenizer(), chat_tokenizer()
    deaf.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(RecipeError, match="leaves the system prompt out"):
        encode(deaf, Text("w20", system="w40"))
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[-1]['content'] }}"
    )
    with pytest.raises(RecipeError, match=r"chat template refuses a conversation \(no system role\)"):
        encode(strict, Text("w20", system="w40"))


def test_pairs_that_are_the_same_tokens_are_counted_and_shown() -> None:
    """The tiny tokenizer drops spaces, and knows no word but its own."""

    def behaviour(test: list[tuple[str, str]], ask: str = "w50") -> Behaviour:
        pairs = tuple(Pair(Text(f"w7 {ask}", positive), Text("w7 w50", negative), "w7") for positive, negative in test)
        train = (
            Pair(Text("w8", "w20"), Text("w8", "w30"), "w8"),
            Pair(Text("w9", "Heard"), Text("w9", "unheard"), "w9"),
        )
        return Behaviour(train, (), pairs, (), (), (), {})

    pairs = [("w20", "w21"), ("w30  w31", "w30\tw31"), ("one thing", "another thing")]
    with pytest.raises(RecipeError) as caught:
        check_texts(loaded("llama"), behaviour(pairs))
    first, second = caught.value.problems
    assert first.startswith(
        "data.train: the two sides of 1 of 2 pairs are the same tokens for this model, for example 'Heard'"
    )
    assert second.startswith(
        "data.test: the two sides of 2 of 3 pairs are the same tokens for this model, for example 'w30  w31' and 'w30\\tw31'"
    )
    with pytest.raises(RecipeError) as caught:
        check_texts(loaded("llama"), behaviour(pairs, "w51"))
    assert len(caught.value.problems) == 1, "what is asked tells the others apart"
