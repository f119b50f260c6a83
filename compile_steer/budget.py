"""`budget`: how much a run measures, as defaults of the other keys. Whatever a recipe sets itself goes first.

A smaller budget changes no gate and no test: intervals get wider, and what too few samples cannot show is reported so.
"""

from __future__ import annotations

from typing import Any, Literal

Budget = Literal["quick", "standard", "thorough"]
BUDGETS: dict[str, dict[str, Any]] = {
    # 24 answered prompts are what a change of the score by a third needs to be significant, and 16 held-out texts what keeps
    # a sound artifact within the gate of top-1. With 48 calibration prompts the closed form leaves 0.5 % of ocean (gate 2 %).
    "quick": {
        "extract": {"shuffled": 8},
        "validate": {
            "sweep_pairs": 8,
            "sweep_prompts": 8,
            "control_pairs": 4,
            "pairs": 20,
            "prompts": 24,
            "max_new_tokens": 24,
            "few_shot": 0,
            "dose_prompts": 2,
            "questions": 24,
            "control_prompts": 8,
            "wordings": 3,
        },
        "compile": {
            "calibration": {"prompts": 48, "max_new_tokens": 32},
            "distill": {"prompts": 32, "block_steps": 300, "epochs": 1},
        },
        "verify": {
            "forms": ["adapter", "merged-fp32"],
            "max_new_tokens": 20,
            "heldout": 16,
            "pairs": 16,
            "neutral": 12,
            "prompts": 8,
            "samples_per_prompt": 2,
            "prompts_per_set": 1,
            "long": 1,
            "long_tokens": 1024,
            "free_tokens": 8,
            "capability": 12,
        },
    },
    "standard": {},
    "thorough": {
        "extract": {"shuffled": 24},
        "validate": {
            "layers": "search",
            "sweep_pairs": 48,
            "sweep_neutral": 24,
            "sweep_prompts": 24,
            "control_pairs": 48,
            "prompts": 64,
            "random_directions": 60,
            "dose_prompts": 12,
        },
        "verify": {
            "heldout": 48,
            "pairs": 100,
            "prompts": 64,
            "samples_per_prompt": 16,
            "prompts_per_set": 4,
            "long": 4,
        },
    },
}
_OPTIONAL = ("extract", "compile", "verify")


def with_budget(recipe: Any) -> Any:
    """The content of a recipe with the defaults of its budget in the sections that are mappings; a validator."""
    budget = recipe.get("budget") if isinstance(recipe, dict) else None
    if not isinstance(budget, str) or budget not in BUDGETS:
        return recipe  # `Budget` says what is wrong with another one
    # `validate` has no default, so that its absence is told as such.
    return _filled(recipe, {k: v for k, v in BUDGETS[budget].items() if k in {*recipe, *_OPTIONAL}})


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(given)
    for key, default in defaults.items():
        value = filled.setdefault(key, {} if isinstance(default, dict) else default)
        if isinstance(default, dict) and isinstance(value, dict):
            filled[key] = _filled(value, default)
    return filled
