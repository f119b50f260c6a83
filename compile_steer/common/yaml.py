"""The one reader of YAML: strict, because what is misread without a word gives a wrong result.

A key that is given twice, an alias, a tag, or a number that versions of YAML read differently is an error here, with its
line, and raises `Malformed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from compile_steer.common.errors import brief, several
from compile_steer.common.reading import Malformed, place_in

MAX_YAML = 2**18  # bytes; a recipe with every key has 6,000
_MAX_DEPTH = 50

Lines = Mapping[tuple[str | int, ...], int]  # of each key and entry, by the path to it


class Yaml(NamedTuple):
    """The content of a YAML text, and where it is."""

    content: Any
    lines: Lines


_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
# Plain text that some version of YAML takes for a number: nobody can tell which is meant.
_UNCLEAR = re.compile(
    r"[-+]?(0[xob][0-9a-fA-F_]+|0[0-9_]+(\.[0-9_]*)?|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?|\.(inf|nan)|\.Inf|\.NaN|\.INF|\.NAN)"
    r"|=|<<"
)


def parse_yaml(text: str) -> Yaml:
    """The content of one YAML document in version 1.2's core schema; raises `Malformed` with line and column.

    Of plain scalars only null, true, false, and decimal numbers are more than text; a date is text. What versions of YAML
    read in different ways (octal numbers, 1_000) must be quoted.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    try:
        return _YamlBuilder(YAML(typ="safe", pure=True).parse(text)).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Malformed(f"{place}{error.problem or error.context}") from error
    except ReaderError as error:
        character = f"the character {error.character:#x}"
        raise Malformed(f"{place_in(text, error.position)}: {character} is not allowed in YAML") from error
    except (YAMLError, ValueError, OverflowError) as error:  # "\\UFFFFFFFF" is no character
        raise Malformed(str(error)) from error


class _YamlBuilder:
    """Builds values from a parser's events; what nobody means to write in a recipe is refused."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._lines: dict[tuple[str | int, ...], int] = {}
        self._problems: list[str] = []

    def document(self) -> Yaml:
        """The only document of the text; raises `Malformed` with every problem that leaves the rest readable."""
        content: Any = None
        documents = 0
        for event in self._events:
            kind = type(event).__name__
            if kind == "DocumentStartEvent":
                documents += 1
                if documents > 1:
                    self._problem(event, "a second document begins; needed: one")
                if event.version is not None:
                    self._problem(event, "a directive %YAML; leave it out, version 1.2 is read")
            elif not kind.startswith(("Stream", "Document")):
                content = self._value(event, ())
        if self._problems:
            raise self._malformed()
        return Yaml(content, self._lines)

    def _problem(self, event: Any, text: str) -> None:
        self._problems.append(f"line {event.start_mark.line + 1}: {text}")

    def _malformed(self) -> Malformed:
        return Malformed("; ".join(several(self._problems)))

    def _value(self, event: Any, path: tuple[str | int, ...]) -> Any:
        self._lines[path] = event.start_mark.line + 1
        if event.anchor:
            self._problem(event, f"the anchor or alias {brief(event.anchor)}; write the value out at each place")
        if getattr(event, "tag", None):
            self._problem(event, f"the tag {brief(str(event.tag))}; leave tags out")
        if len(path) > _MAX_DEPTH:
            self._problem(event, f"nested more than {_MAX_DEPTH} deep")
            raise self._malformed()
        kind = type(event).__name__
        if kind == "MappingStartEvent":
            return self._mapping(path)
        if kind == "SequenceStartEvent":
            entries: list[Any] = []
            while type(entry := next(self._events)).__name__ != "SequenceEndEvent":
                entries.append(self._value(entry, (*path, len(entries))))
            return entries
        return self._scalar(event) if kind == "ScalarEvent" else None

    def _mapping(self, path: tuple[str | int, ...]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        while type(event := next(self._events)).__name__ != "MappingEndEvent":
            key = self._value(event, (*path, ""))
            if not isinstance(key, str):
                self._problem(event, f"the key {brief(key)} is no text; needed: a name, or quotes around it")
                key = str(key)
            if key in content:
                first = self._lines[(*path, key)]
                self._problem(event, f"the key {brief(key)} is given twice (first in line {first})")
            value = self._value(next(self._events), (*path, key))
            self._lines[(*path, key)] = event.start_mark.line + 1
            content[key] = value
        return content

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if "\0" in text or (not text.isascii() and re.search("[\ud800-\udfff]", text)):
            self._problem(event, "a text holds NUL or half of a surrogate pair")
        if event.style is not None:  # quoted, or a block
            return text
        if text in _NULLS:
            return None
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        if len(text) <= 400 and _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            if math.isfinite(number := float(text)):
                return number
            self._problem(event, f"the number {text:.40} is too large for a float")
        if _UNCLEAR.fullmatch(text):
            self._problem(
                event,
                f"{text:.40} is read as a number or as text by different versions of YAML; quote it if it is text",
            )
        return text
