"""What is wrong with a recipe that was refused: each problem with its file, line and key, and what it was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from compile_steer.common.options import dotted, explain_one
from compile_steer.common.yaml import Lines

# Keys, and values as KEY=VALUE, that earlier versions had: the message says what they are called now.
RENAMED_KEYS = {
    "compile.closed_form.stages.writer": "projection",
    "compile.distill.neutral_weight": "compile.distill.base_kl_weight",
    "compile.full.neutral_weight": "compile.full.base_kl_weight",
    "data.write": "data.generate",
    "data.kind=written": "generated",
    "extract.trained.beside": "extract.trained.other_points",
    "validate.claim": "validate.minimum_effect",
    "validate.coefficients.ceiling": "validate.coefficients.perplexity_limit",
    "validate.mismatched": "validate.other_behaviour",
    "verify.gates.drift_margin": "verify.gates.control_kl_margin",
    "verify.gates.recovery": "verify.gates.effect_retained",
    "verify.gates.recovery_low": "verify.gates.effect_retained_low",
    "verify.gates.share": "verify.gates.kl_remaining",
    "verify.kinds": "verify.prompts_per_set",
}


def explain_recipe(
    error: ValidationError, recipe: type[BaseModel], content: Any, source: str, numbers: Lines
) -> list[str]:
    """Return one line a problem: file and line, the key, what was found, what was needed, the new or the likely name.

    Args:
        recipe: the model that refused `content`.
        numbers: the line in `source` of each key.
    """
    lines = []
    for item in error.errors():
        steps, kind = [str(step) for step in item["loc"]], item["type"]
        path = _path_in_file(item["loc"], content)
        place = f"{source}:{numbers[path]}" if path and path in numbers else source
        where = dotted([*path, *(steps[-1:] if kind == "missing" else ())])
        text = f"{explain_one(item, '')}."
        if kind == "extra_forbidden":
            known = _keys(recipe, steps[:-1])
            similar = difflib.get_close_matches(steps[-1], known, n=1)
            hint = f"did you mean '{similar[0]}'?" if similar else f"known here: {', '.join(sorted(known))}."
            renamed = RENAMED_KEYS.get(re.sub(r"\.\d+", "", where))  # keys of a list's entries without their number
            text = f"is now called {renamed}." if renamed else f"unknown key; {hint}"
        elif kind == "union_tag_invalid":
            where, tag = f"{where}.kind", item["ctx"]["tag"]
            renamed = RENAMED_KEYS.get(f"{where}={tag}")
            needed = f"it is now called {renamed}" if renamed else f"needed: {item['ctx']['expected_tags']}"
            text = f"found '{tag}'; {needed}."
        lines.append(": ".join(part for part in (place, where, text) if part))
    return lines


def _path_in_file(steps: Sequence[int | str], content: Any) -> tuple[int | str, ...]:
    """Return the steps that are in the file, without the tags by which sections of several kinds were chosen."""
    path: list[int | str] = []
    for step in steps:
        inside = content if isinstance(content, dict) else range(len(content) if isinstance(content, list) else 0)
        if step in inside:
            content = content[step]
            path.append(step)
    return tuple(path)


def _keys(recipe: type[BaseModel], steps: Sequence[str]) -> list[str]:
    """Return the known keys of the section at `steps`, through lists and tagged choices."""
    sections = [recipe]
    for step in steps:
        fields = [f for s in sections for name, f in s.model_fields.items() if step in (name, f.alias)]
        if fields:
            sections = [section for field in fields for section in _sections(field.annotation)]
        elif not step.isdigit():  # the tag of a choice ("keywords"), which a section names in its kind
            kinds = {section: section.model_fields.get("kind") for section in sections}
            tagged = [section for section, kind in kinds.items() if kind and step in get_args(kind.annotation)]
            sections = tagged or sections
    return [f.alias or name for s in sections for name, f in s.model_fields.items() if name != "folder"]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
