"""The one reader each of text, JSON and JSONL: strict, because what is misread without a word gives a wrong result.

A key that is given twice, NaN, a number that no float holds, or half of a surrogate pair is an error here, with its line.
Whatever is wrong raises `Malformed`; the caller knows which error of ours that is, and what to do about it.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from compile_steer.common.errors import brief

MAX_JSON = 64 * 2**20  # bytes; a tokenizer of 256,000 tokens has about half as many
MAX_LINES = 2**28  # of a JSONL file, whose rows are kept: about a million of them
_MAX_LINE = 2**22

# Encodings by how a file begins. UTF-32 first: its mark begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Malformed(ValueError):
    """Why a text or a file cannot be read, with line and column where there are any."""


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of at most `limit` bytes in UTF-8, with or without a mark at its start; raises `Malformed`."""
    with _opened(path, limit) as file:
        return _decoded(file.read(limit))


def _opened(path: Path, limit: int) -> BinaryIO:
    """Open a regular file; raises `Malformed` for all else, a pipe too: to wait for its writer could take forever."""
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
            return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Malformed(getattr(error, "strerror", None) or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise Malformed("it is a folder; needed: a file")
    if not stat.S_ISREG(status.st_mode):
        raise Malformed("it is a pipe, a socket or a device; needed: a file")
    raise Malformed(f"it has {status.st_size:,} bytes; at most {limit:,} are read")


def _decoded(data: bytes, line: int = 1) -> str:
    """Text in UTF-8, which begins in a file's `line`; raises `Malformed` that names the encoding and the cure."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None) if line == 1 else None
    if line == 1 and encoding is None and b"\0" in data[:4]:  # every second byte of ASCII in UTF-16
        encoding = "UTF-16 or binary"
    if encoding is not None:
        raise Malformed(f"it is {encoding}; needed: UTF-8 (iconv -f {encoding.split()[0]} -t UTF-8 FILE > NEW)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        raise Malformed(
            f"{place_in(before, len(before), line)}: byte {data[error.start]:#x} is not UTF-8; the file may be Latin-1 or "
            "Windows-1252 (iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW)"
        ) from error


def place_in(text: str, position: int, first: int = 1) -> str:
    """Line and column of a position in a text that begins in line `first`."""
    return f"line {first + text.count(chr(10), 0, position)}, column {position - text.rfind(chr(10), 0, position)}"


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """The value of a JSON file; raises `Malformed`."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """The value of a JSON text; raises `Malformed` with line and column."""
    if not text.strip():
        raise Malformed("it is empty")
    try:
        # Two parsers: the first knows the place of every error and limits the depth, the second lets the pairs be seen.
        from_json(text.encode(), allow_inf_nan=False)
        return _DECODER.decode(text)
    except _Refused as error:
        raise Malformed(_refusal(text)) from error
    except UnicodeEncodeError as error:  # of a str, as a command line may hold
        raise Malformed(f"{place_in(text, error.start)}: half of a surrogate pair is no character") from error
    except (ValueError, RecursionError) as error:
        raise Malformed(_reason(str(error), text)) from error


def _reason(message: str, text: str) -> str:
    """What pydantic's parser says, with the place first, and in our words where its own do not say what to do."""
    reason, _at, place = message.rpartition(" at line ")
    if reason in ("expected value", "invalid number"):
        line, column = map(int, place.split(" column "))
        rest = text.split("\n")[line - 1].encode()[column - 1 :]
        if rest.startswith((b"NaN", b"Infinity")):
            reason = "NaN and Infinity are no JSON; needed: a finite number"
    known = {
        "recursion limit exceeded": "brackets are nested more than 200 deep",
        "number out of range": "a number has more than 4,300 digits",
        "lone leading surrogate in hex escape": "half of a surrogate pair is no character",
        "unexpected end of hex escape": "half of a surrogate pair is no character",
    }
    return f"line {place.replace(' column', ', column')}: {known.get(reason, reason)}" if reason else message


class _Refused(Exception):
    """JSON in which an object has a key twice, or a number is larger than any float."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Refused
    return value


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise _Refused
    return value


def _integer(number: str) -> int:
    _finite(number)  # or a field of floats would take it for infinity
    return int(number)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_int=_integer)
_TOKEN = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[{}]|-?\d[-+.\deE]*')


def _refusal(text: str) -> str:
    """Place and reason of the first thing for which `_DECODER` refuses a text that is valid JSON."""
    keys: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        reason = ""
        if token[0] == "{":
            keys.append(set())
        elif token[0] == "}":
            keys.pop()
        elif token[2]:
            key = json.loads(token[1])
            reason = f"the key {brief(key)} is given twice" if key in keys[-1] else ""
            keys[-1].add(key)
        elif token[1] is None and math.isinf(float(token[0])):
            reason = f"the number {token[0]:.40} is too large for a float"
        if reason:
            return f"{place_in(text, token.start())}: {reason}"
    raise AssertionError("the decoder refused what is in order")


def read_json_lines(path: Path, limit: int = MAX_LINES) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each line of a JSONL file that is not blank; of a line that is no JSON the `Malformed`.

    One line is held at a time. Raises `Malformed` where the file as a whole cannot be read, and for a line of over 4 MiB.
    """
    with _opened(path, limit) as file:
        number = 0
        # Bytes, which only a line feed divides: JSON text may contain U+2028.
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            if len(line) > _MAX_LINE:
                raise Malformed(f"line {number} has more than {_MAX_LINE:,} bytes")
            text = _decoded(line, number)  # another encoding is the file's fault, not a line's
            if text.strip():
                try:
                    yield number, parse_json(text)
                except Malformed as error:
                    yield number, Malformed(str(error).removeprefix("line 1, "))
