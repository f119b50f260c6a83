"""The words of compile_steer, from the file that the documentation includes as well."""

from __future__ import annotations

import re
from importlib.resources import files

_DEFINITION = re.compile(r"^- \*\*(.+?)\*\*: (.+)$", re.MULTILINE)


def glossary_terms() -> dict[str, str]:
    """Return every term with its definition, in reading order."""
    text = files("compile_steer.report").joinpath("glossary.md").read_text(encoding="utf-8")
    return dict(_DEFINITION.findall(text))
