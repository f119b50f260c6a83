"""What MkDocs fills in: the table of recipe keys, from the recipe's own sections, and the README's first program."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compile_steer.recipe import Recipe

KEYS, PROGRAM = "<!-- recipe keys -->", "<!-- program -->"
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the places that a page marks."""
    if KEYS in markdown:
        markdown = markdown.replace(KEYS, "\n".join(_section("recipe", Recipe, set())))
    if PROGRAM in markdown:
        readme = Path("README.md").read_text("utf-8")
        program = readme.partition("<!-- program:start -->")[2].partition("<!-- program:end -->")[0]
        markdown = markdown.replace(PROGRAM, program.strip())
    return markdown


def _section(path: str, section: type[BaseModel], done: set[type[BaseModel]]) -> Iterator[str]:
    """A heading, what the section is for, a table of its keys; then the sections in it, each once."""
    done.add(section)
    kind = section.model_fields.get("kind")
    title = f"`{path}`" + (f", kind `{typing.get_args(kind.annotation)[0]}`" if kind else "")
    yield f"\n## {title}\n\n{' '.join((section.__doc__ or '').split())}\n\n| key | value | default | meaning |\n|---|---|---|---|"
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        if field.exclude:  # where the file lies, which no recipe says
            continue
        key = field.alias or name
        inner += [(f"{path}.{key}".removeprefix("recipe."), one) for one in _sections(field.annotation)]
        bounds = [f"{word} {getattr(m, limit)}" for m in field.metadata for limit, word in BOUNDS.items() if hasattr(m, limit)]
        default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
        cells = (f"`{key}`", ", ".join([_values(field.annotation), *bounds]), default, field.description or "")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for where, one in inner:
        if one not in done:
            yield from _section(where, one, done)


def _default(default: Any) -> str:
    if isinstance(default, BaseModel) or default in ("", (), {}):
        return ""
    return f"`{list(default) if isinstance(default, tuple) else default!r}`".replace("'", "").replace("None", "none")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def _values(annotation: Any) -> str:
    """A type in words."""
    if annotation in NAMES:
        return NAMES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    arguments = [argument for argument in typing.get_args(annotation) if argument not in (..., type(None))]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    words = list(dict.fromkeys(filter(None, map(_values, arguments))))
    if typing.get_origin(annotation) in (tuple, list):
        return f"a list of {words[0]}"
    return "a mapping" if typing.get_origin(annotation) is dict else " or ".join(words)
