"""Data that are wrong: a line, a row, a whole file, or rows that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.campaign.case import Bad, Case
from benchmarks.campaign.edits import as_folder, as_link
from tests.helpers.small_run import words as draw_words

ROW = {"prompt": "w60 w61", "positive": "w71 w72 w73", "negative": "w81 w82 w83"}
GOOD = json.dumps(ROW)
LINE = "train.jsonl:2|line 2"


def _line(line: str | bytes, case: Case, split: str = "train") -> None:
    """Replace the second line."""
    lines = case.data(split).read_bytes().split(b"\n")
    lines[1] = line.encode("utf-8") if isinstance(line, str) else line
    case.data(split).write_bytes(b"\n".join(lines))


def _rows(change: Callable[[list[dict[str, Any]]], object], case: Case, split: str = "train") -> None:
    rows = [json.loads(line) for line in case.data(split).read_text().split("\n") if line]
    change(rows)
    case.data(split).write_text("\n".join(map(json.dumps, rows)))


def _whole(change: Callable[[bytes], bytes], case: Case) -> None:
    case.data().write_bytes(change(case.data().read_bytes()))


def _row(**changes: Any) -> str:
    return json.dumps({key: value for key, value in {**ROW, **changes}.items() if value is not KeyError})


# The second line of the training data; what the message must say beside its file and number.
LINES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "not JSON": ("{prompt}", ("JSON",)),
    "cut off": (GOOD[:-9], ("JSON",)),
    "two objects": (GOOD + GOOD, ("JSON",)),
    "trailing comma": (GOOD[:-1] + ",}", ("JSON",)),
    "single quotes": (GOOD.replace('"', "'"), ("JSON",)),
    "a comment": ("// nothing", ("JSON",)),
    "a list": ("[1]", ("list",)),
    "a text": ('"w60"', ("str",)),
    "null": ("null", ()),
    "NaN": ("NaN", ()),
    "key twice": (GOOD[:-1] + ', "positive": "w90"}', ("positive",)),
    "key missing": (_row(positive=KeyError), ("positive",)),
    "unknown key": (_row(postive="w7"), ("postive",)),
    "null value": (_row(positive=None), ("positive",)),
    "number value": (_row(prompt=7), ("prompt",)),
    "NaN value": (GOOD.replace('"w60 w61"', "NaN"), ("column 12",)),
    "list value": (_row(prompt=["w7"]), ("prompt",)),
    "object value": (_row(negative={"text": "w7"}), ("negative",)),
    "boolean value": (_row(negative=True), ("negative",)),
    "empty text": (_row(positive=""), ("positive",)),
    "blank text": (_row(positive=" \t "), ("positive",)),
    "zero-width text": (_row(positive="\u200b"), ("positive",)),
    "lone surrogate": ('{"prompt": "w6 \\ud83d", "positive": "w7", "negative": "w8"}', ("surrogate",)),
    "raw surrogate": (b'{"prompt": "w6 \xed\xa0\xbd", "positive": "w7", "negative": "w8"}', ()),
    "control token": (_row(prompt="w7 </s> <s> assistant"), ("prompt", "w7")),
    "control token in a response": (_row(positive="w7 </s> w8"), ("positive", "w7")),
    "5,000 digits": ('{"prompt": ' + "9" * 5000 + ', "positive": "w7", "negative": "w8"}', ()),
    "deep brackets": ("[" * 100_000, ()),
    "deep braces": ('{"prompt":' * 50_000, ()),
    "deep but closed": ('{"prompt": ' + "[" * 3000 + "]" * 3000 + "}", ()),
    "Latin-1": (GOOD.encode().replace(b"w60", b"caf\xe9"), ("UTF-8",)),
    "null bytes": (b"\0" * 64, ()),
    "carriage returns": (GOOD.replace(" ", "\r"), ()),
    "sides equal": (_row(negative=ROW["positive"]), ("positive",)),
    "a history": (_row(history=[["w7", "w8"]]), ("history",)),
    "a megabyte as a prompt": (_row(prompt="w7 " * 350_000), ("prompt", "w7")),
    "a prompt beyond the model's length": (_row(prompt="w7 " * 200), ("prompt", "w7")),
}
FILES: dict[str, tuple[Callable[[Case], object], tuple[str, ...]]] = {
    "empty": (partial(_whole, lambda _: b""), ("empty",)),
    "only line breaks": (partial(_whole, lambda _: b"\n" * 99), ("empty",)),
    "missing": (lambda case: case.data().unlink(), ("data.train",)),
    "a folder": (lambda case: as_folder(case.data()), ("data.train",)),
    "a link to nowhere": (lambda case: as_link(case.data(), "nowhere"), ("data.train",)),
    "a link to itself": (lambda case: as_link(case.data(), "train.jsonl"), ("data.train",)),
    "a device": (lambda case: as_link(case.data(), "/dev/zero"), ("data.train",)),
    "UTF-16": (partial(_whole, lambda text: text.decode().encode("utf-16")), ("UTF-8",)),
    "UTF-32": (partial(_whole, lambda text: text.decode().encode("utf-32")), ("UTF-8",)),
    "compressed": (partial(_whole, lambda _: b"\x1f\x8b\x08\0" + bytes(range(256))), ()),
    "binary": (partial(_whole, lambda _: bytes(range(256)) * 9), ()),
    "one JSON list": (partial(_whole, lambda text: b"[" + text.replace(b"\n", b",\n") + b"]"), ()),
    "one indented object": (partial(_whole, lambda _: json.dumps(ROW, indent=1).encode()), ()),
    "a table": (partial(_whole, lambda _: b"prompt,positive,negative\nw7,w8,w9\n"), ("JSON",)),
    "a prompt twice": (partial(_rows, lambda rows: rows[1].update(prompt=rows[0]["prompt"])), (r"prompt",)),
    "all sides equal": (partial(_rows, lambda rows: [row.update(negative=row["positive"]) for row in rows]), ()),
    "other columns": (partial(_rows, lambda rows: [row.update(chosen=row.pop("positive")) for row in rows]), ("chosen",)),
    "numbers as texts of all rows": (partial(_rows, lambda rows: [row.update(positive=7) for row in rows]), ("positive",)),
    "100,000 bad rows": (partial(_whole, lambda _: b'{"prompt": 1}\n' * 100_000), ("more rows",)),
}  # fmt: skip


def _share(source: str, target: str, key: str, case: Case) -> None:
    """Give the second row of a split a text of another's."""
    row = json.loads(case.data(source).read_text().split("\n")[0])
    _rows(lambda rows: rows[1].update({key: row[key]}), case, target)


def _choices(rows: Callable[[int], dict[str, Any]], case: Case) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        found = [rows(100 * number + n) for n in range(12)]
        case.data(split).write_text("\n".join(map(json.dumps, found)))
    case.set(data__kind="choices", validate__score={"kind": "choice"})


def _choice(n: int, **changes: Any) -> dict[str, Any]:
    return {"question": draw_words(n, 5), "choices": ["w7", "w8", "w9"], "answer": n % 3, **changes}


CHOICES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no choices": ({"choices": []}, ("choices",)),
    "one choice": ({"choices": ["w7"]}, ("choices",)),
    "a choice twice": ({"choices": ["w7", "w7 ", "w9"]}, ("choices",)),
    "27 choices": ({"choices": [f"w{n}" for n in range(27)]}, ("choices",)),
    "choices as a text": ({"choices": "w7 w8"}, ("choices",)),
    "an answer beyond": ({"answer": 3}, ("answer",)),
    "a negative answer": ({"answer": -1}, ("answer",)),
    "an answer that is no choice": ({"answer": "w6"}, ("answer",)),
    "a boolean answer": ({"answer": True}, ("answer",)),
    "half an answer": ({"answer": 0.5}, ("answer",)),
    "always the first answer": ({"answer": 0}, ("answer",)),
}
PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "neutral without response": ("neutral", _row(positive=KeyError, negative=KeyError), ("response",)),
    "neutral with a pair": ("neutral", GOOD, ("response",)),
    "neutral with a text as history": ("neutral", '{"prompt": "w7", "response": "w8", "history": "w9"}', ("history",)),
    "neutral with half a turn": ("neutral", '{"prompt": "w7", "response": "w8", "history": [["w9"]]}', ("history",)),
    "heldout with a response": ("heldout", '{"prompt": "w7", "response": "w8"}', ("response",)),
    "calibration with a number": ("calibration", '{"prompt": 7}', ("prompt",)),
    "calibration cut off": ("calibration", '{"prompt": "w7', ("JSON",)),
    "heldout twice a key": ("heldout", '{"prompt": "w7", "prompt": "w8"}', ("prompt",)),
    "other behaviour cut off": ("other_behaviour", '{"prompt": "w7', ("JSON",)),
    "other behaviour twice a key": ("other_behaviour", GOOD[:-1] + ', "positive": "w90"}', ("positive",)),
}


def inputs() -> Iterator[Bad]:
    """One bad line, a bad file, a text in two splits, bad choices, bad lines of the other parts."""
    for name, (line, words) in LINES.items():
        yield Bad(f"data: {name}", partial(_line, line), (LINE, *words))
    for name, (edit, words) in FILES.items():
        yield Bad(f"data: {name} (file)", edit, ("train", *words))
    for source, target, key in (
        ("train", "test", "prompt"), ("train", "validation", "positive"), ("test", "neutral", "prompt"),
        ("test", "heldout", "prompt"), ("test", "calibration", "prompt"), ("validation", "test", "negative"),
    ):  # fmt: skip
        name = f"data: a {key} of {source} in {target}"
        yield Bad(name, partial(_share, source, target, key), (source, target))
    for name, (changes, words) in CHOICES.items():
        yield Bad(f"data: {name}", partial(_choices, partial(_choice, **changes)), ("train", *words))
    for name, (split, line, words) in PARTS.items():
        yield Bad(f"data: {name}", partial(_part, split, line), (f"{split}.jsonl:2", *words))


def _part(split: str, line: str, case: Case) -> None:
    _line(line, case, split)
