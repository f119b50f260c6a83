"""Fill the templates of cards and pages: a value from outside is text in them, whatever it holds.

No template marks anything as safe. What is markup already (a chart, a span of code) is `Markup` where it is made.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from compile_steer.common.errors import plain

# What CommonMark and GitHub's additions (tables, strike-through, bare links) read as more than text. Between letters an
# underscore does nothing, nor does a bracket that no address follows, as those of an interval.
_MARKDOWN = re.compile(
    r"[\\`*|~&<]|\[(?![^\[\]]*\](?![\[(:]))|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.|^(?:>|[-+=#](?!\d))"
)
_ENTITIES = {"&": "&amp;", "<": "&lt;"}  # not every reader of Markdown takes a backslash before these


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; every value becomes text of HTML or of Markdown, by the template's name."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    html = template.endswith(".html")
    environment = Environment(
        loader=PackageLoader("compile_steer.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=html,
        finalize=_visible if html else markdown,
    )
    environment.filters.update(code=_code, code_block=_code_block)
    return environment.get_template(template).render(values)


def _visible(value: Any) -> Any:
    """The value without characters that reorder or hide a page's text; jinja escapes what HTML reads."""
    return value if isinstance(value, Markup) else plain(str(value))


def markdown(value: Any) -> Markup:
    """The value as one line of Markdown that shows it as it stands, in running text and in a table's cell."""
    if isinstance(value, Markup):
        return value
    line = " ".join(plain(str(value)).split())
    return Markup(_MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line))


def _code(value: object) -> Markup:
    """The value as a span of code; as text where it holds what would end the span, or the cell that it stands in."""
    text = plain(str(value))
    return Markup(f"`{text}`") if re.fullmatch(r"[^`|<\s]([^`|<\n]*[^`|<\s])?", text) else markdown(text)


def _code_block(value: object) -> Markup:
    """The lines as an indented block of code, which no line of it can end."""
    return Markup("\n".join(f"    {line}".rstrip() for line in plain(str(value)).split("\n")))
