"""Templates of prompts: plain text with placeholders in braces."""

from __future__ import annotations

import re
from collections.abc import Iterator


def template_problems(key: str, template: str, *placeholders: str) -> Iterator[str]:
    """Yield a line for each placeholder that the template does not contain exactly once."""
    for placeholder in placeholders:
        if template.count(placeholder) != 1:
            yield f"data.{key} '{template}' must contain {placeholder} exactly once."


def fill(template: str, **values: str) -> str:
    """Return the template with its placeholders replaced; braces in a value, and other braces, stay text."""
    # In one pass: a value that contains another placeholder must not be filled again.
    return re.sub(r"\{([^{}]*)\}", lambda match: values.get(match[1], match[0]), template)
