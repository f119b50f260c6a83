"""The strict readers: everything that another reader takes without a word, or falls over, is one error with its place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from compile_steer.common.reading import Malformed, parse_json, read_json, read_json_lines, read_text
from compile_steer.common.yaml import parse_yaml

JSON = [
    ("", "it is empty"),
    (" \n\t", "it is empty"),
    ("{", "line 1, column 1: EOF while parsing an object"),
    ('{\n  "a": tru}', "line 2, column 11: expected ident"),
    ("{'a': 1}", "line 1, column 2: key must be a string"),
    ('{"a": 1,}', "line 1, column 9: trailing comma"),
    ('{"a": 1} x', "line 1, column 10: trailing characters"),
    ("{} {}", "trailing characters"),
    ("// no\n{}", "line 1, column 1: expected value"),
    ("[" * 100_000, "line 1, column 202: brackets are nested more than 200 deep"),
    ('{"a":' * 100_000, "brackets are nested more than 200 deep"),
    ("9" * 5000, "a number has more than 4,300 digits"),
    ("9" * 400, "is too large for a float"),
    ("[1,\n 1e400]", "line 2, column 2: the number 1e400 is too large for a float"),
    ("-1e999", "too large for a float"),
    ("NaN", "line 1, column 1: NaN and Infinity are no JSON"),
    ("[1, -Infinity]", "line 1, column 6: NaN and Infinity are no JSON"),
    ("01", "invalid number"),
    ("0x1F", "line 1, column 2"),
    ("+1", "expected value"),
    ('"\\ud83d"', "half of a surrogate pair"),
    ('"\\ud83d\\u0041"', "half of a surrogate pair"),
    ('"\\udc00"', "half of a surrogate pair"),
    ('"\ud83d"', "half of a surrogate pair"),
    ('"a\x00b"', "control character"),
    ('"a\nb"', "line 2, column 0: control character"),
    ('"\\x41"', "invalid escape"),
    ('{"a": 1, "a": 1}', "line 1, column 10: the key 'a' is given twice"),
    ('{"a": 1,\n "b": {"x": 1,\n\n "x": 2}}', "line 4, column 2: the key 'x' is given twice"),
    ('{"a": {"b": "a\\": 1", "c": [{"a": 1}]},\n"\\u0061": 2}', "line 2, column 1: the key 'a' is given twice"),
]
YAML = [
    ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice (first in line 1)"),
    ("a: {b: 1, b: 2}\nc: {d: 1, d: 2}", "line 1: the key 'b' is given twice (first in line 1); line 2: the key 'd'"),
    ("a: &x [1]\nb: *x", "line 1: the anchor or alias 'x'; write the value out at each place; line 2"),
    ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "line 2: the anchor or alias 'b'"),
    ("a: &a [*a]", "the anchor or alias 'a'"),
    ("a: !!python/object/apply:os.system [ls]", "line 1: the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("a: !x 1", "line 1: the tag '!x'"),
    ("a: !!int '3'", "the tag"),
    ("<<: {a: 1}", "line 1: << is read as"),
    ("1: a", "line 1: the key 1 is no text"),
    ("true: a", "the key True is no text"),
    ("null: a", "the key None is no text"),
    ("? [a, b]\n: 1", "the key ['a', 'b'] is no text"),
    ("a:\n  - 1_000", "line 2: 1_000 is read as a number or as text by different versions of YAML; quote it"),
    ("a: 010", "010 is read as"),
    ("a: 0o17", "0o17 is read as"),
    ("a: 0x1F", "0x1F is read as"),
    ("a: 0b11", "0b11 is read as"),
    ("a: .nan", ".nan is read as"),
    ("a: -.inf", "-.inf is read as"),
    ("a: 1e400", "the number 1e400 is too large for a float"),
    ("a: " + "9" * 5000, "is too large for a float"),
    ("a: 1\n---\nb: 2", "line 2: a second document begins"),
    ("%YAML 1.1\n---\na: 1", "a directive %YAML"),
    ("a:\n\tb: 1", "line 2, column 1: found character '\\t'"),
    ("a: [1, 2", "line 1, column 9: expected ',' or ']'"),
    ("a: 'x", "found unexpected end of stream"),
    ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
    ("a: \x00", "line 1, column 4: the character 0x0 is not allowed in YAML"),
    ("b: 1\na: \x1b[0m", "line 2, column 4: the character 0x1b"),
    ('a: "\\0"', "line 1: a text holds NUL or half of a surrogate pair"),
    ('a: "\\ud83d"', "a text holds NUL or half of a surrogate pair"),
    ('a: "\\UFFFFFFFF"', "too large"),
    ("[" * 100_000, "nested more than 50 deep"),
    ("{a: " * 100_000, "nested more than 50 deep"),
    ("- " * 100_000, "nested more than 50 deep"),
    ("? " * 100_000, "nested more than 50 deep"),
]
FILES: list[tuple[bytes, str]] = [
    (
        '{"a": "é"}'.encode("latin-1"),
        "line 1, column 8: byte 0xe9 is not UTF-8; the file may be Latin-1 or Windows-1252",
    ),
    (b'{"a": 1,\n "b": "\x93x\x94"}', "line 2, column 8: byte 0x93 is not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "it is UTF-16; needed: UTF-8 (iconv -f UTF-16 -t UTF-8"),
    ('{"a": 1}'.encode("utf-16-be"), "it is UTF-16 or binary"),
    ('{"a": 1}'.encode("utf-32"), "it is UTF-32"),
    (b'{"a": "\xed\xa0\xbd"}', "is not UTF-8"),
    (b"\0" * 100, "binary"),
    (b"\xff" * 100, "is not UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), JSON, ids=[ascii(text[:30]) for text, _message in JSON])
def test_json_that_is_not_sound_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_json(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("text", "message"), YAML, ids=[ascii(text[:30]) for text, _message in YAML])
def test_yaml_that_is_not_clear_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_yaml(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("data", "message"), FILES, ids=[repr(data[:12]) for data, _message in FILES])
def test_another_encoding_is_named_with_the_cure(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data)
    for read in (read_json, lambda path: list(read_json_lines(path))):
        with pytest.raises(Malformed) as caught:
            read(path)
        assert message in str(caught.value)


def test_what_is_sound_is_read_as_everybody_reads_it() -> None:
    text = '{"a": [1, -0, 2.5e3, "\\ud83d\\ude00\\u0000", true, null, {}], "b": {"a": 1e-320}}'
    assert parse_json(text) == json.loads(text)
    yaml = (
        "a: 1e-5\nb: [yes, NO, 1:30, 2024-01-01, ~, True, -3, .5, 5., '010', \"2024-01-01\"]\nc:\n  d: |\n    x\n  'e': {}\n  f:\n"
        '"1": \ud7ff\n'
    )
    assert parse_yaml(yaml).content == {
        "a": 1e-5,
        "b": ["yes", "NO", "1:30", "2024-01-01", None, True, -3, 0.5, 5.0, "010", "2024-01-01"],
        "c": {"d": "x\n", "e": {}, "f": None},
        "1": "\ud7ff",
    }
    assert parse_yaml(yaml).lines["c", "d"] == 4
    assert parse_yaml(text.replace("\\ud83d\\ude00\\u0000", "x")).content == json.loads(
        text.replace("\\ud83d\\ude00\\u0000", "x")
    )
    assert parse_yaml("").content is None


def test_a_mark_at_the_start_of_utf_8_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xe2\x80\xa8"}\n')
    assert list(read_json_lines(tmp_path / "a")) == [(1, {"a": 1}), (3, {"a": "\u2028"})]
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "b") == [1]


def test_only_a_regular_file_of_a_sensible_size_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30)
    cases: dict[Any, str] = {
        "none": "No such file or directory",
        ".": "it is a folder; needed: a file",
        "pipe": "it is a pipe, a socket or a device; needed: a file",
        "/dev/zero": "it is a pipe, a socket or a device; needed: a file",
        "loop": "Too many levels of symbolic links",
        "a\0b": "null byte",
        "a" * 300: "File name too long",
        "none/under": "No such file or directory",
        "large": "it has 1,073,741,824 bytes; at most 67,108,864 are read",
    }
    started = time.monotonic()
    for name, message in cases.items():
        with pytest.raises(Malformed, match=message.replace("(", r"\(")):
            read_json(tmp_path / name)
    with pytest.raises(Malformed, match="at most 268,435,456 are read"):
        list(read_json_lines(tmp_path / "large"))
    with pytest.raises(Malformed, match="at most 10 are read"):
        read_text(tmp_path / "large", 10)
    assert time.monotonic() - started < 1


def test_one_bad_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'1\n{"a": 1, "a": 2}\n\n[NaN]\n2\n')
    lines = list(read_json_lines(tmp_path / "a"))
    assert [number for number, _value in lines] == [1, 2, 4, 5]
    assert [str(value) for _number, value in lines] == [
        "1", "column 10: the key 'a' is given twice", "column 2: NaN and Infinity are no JSON; needed: a finite number", "2"
    ]  # fmt: skip
    (tmp_path / "a").write_bytes(b'1\n"' + b"x" * 2**22 + b'"\n')
    with pytest.raises(Malformed, match="line 2 has more than 4,194,304 bytes"):
        list(read_json_lines(tmp_path / "a"))
