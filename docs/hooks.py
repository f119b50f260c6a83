"""What MkDocs fills in: the table of recipe keys, from the recipe's own sections, and the README's first program."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from compile_steer.recipe import Recipe

KEYS, PROGRAM = "<!-- recipe keys -->", "<!-- program -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places that a page marks."""
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, "\n".join(_section("recipe", Recipe)))
    if PROGRAM in markdown:
        readme = Path("README.md").read_text("utf-8")
        program = readme.partition("<!-- program:start -->")[2].partition("<!-- program:end -->")[0]
        markdown = markdown.replace(PROGRAM, program.strip())
    return markdown


def _section(path: str, section: type[BaseModel]) -> Iterator[str]:
    """A heading, what the section is for, a table of its keys; then the same of the sections in it."""
    below = []
    yield f"\n## `{path}`\n\n{' '.join((section.__doc__ or '').split())}\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|"
    for name, field in section.model_fields.items():
        if field.exclude:  # where the file lies, which no recipe says
            continue
        key = field.alias or name
        inner = list(_sections(field.annotation))
        below += [(f"{path}.{key}".removeprefix("recipe."), one) for one in inner]
        values = "a section, below" if inner and _values(field.annotation) == "" else _values(field.annotation)
        limits = [str(limit) for limit in field.metadata if re.match(r"G[te]|L[te]|Ge|Le", type(limit).__name__)]
        bounds = ", ".join(re.sub(r"(Gt|Ge|Lt|Le)\(\w+=(.*)\)", _bound, limit) for limit in limits)
        default = "needed" if field.is_required() else "" if inner else f"`{_plain(field.default)}`"
        yield f"| `{key}` | {', '.join(filter(None, (values, bounds)))} | {default} | {field.description or ''} |"
    for where, inner_section in below:
        kind = inner_section.model_fields.get("kind")
        choices = typing.get_args(kind.annotation) if kind else ()
        yield from _section(f"{where} (kind: {choices[0]})" if choices else where, inner_section)


def _bound(match: re.Match[str]) -> str:
    return {"Gt": "above", "Ge": "at least", "Lt": "below", "Le": "at most"}[match[1]] + f" {match[2]}"


def _plain(default: Any) -> str:
    if default is PydanticUndefined:
        return ""
    return str(list(default)) if isinstance(default, tuple) else "none" if default is None else str(default)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def _values(annotation: Any) -> str:
    """A type in words: `a`, `b`, or numbers."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return " or ".join(filter(None, map(_values, typing.get_args(annotation))))
    if typing.get_origin(annotation) in (tuple, dict, list):
        inner = [_values(argument) for argument in typing.get_args(annotation) if argument is not ...]
        return f"a list of {inner[0]}" if inner and inner[0] else ""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(annotation, "path" if getattr(annotation, "__name__", "") == "Path" else "")
