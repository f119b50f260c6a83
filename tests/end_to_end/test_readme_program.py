"""The first Python program of the README runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compile_steer
from compile_steer.verification.parity import Parity
from tests.end_to_end.conftest import ROOT

BLOCK = re.compile(r"<!-- program:start -->\n```python\n(.*?)```\n<!-- program:end -->", re.DOTALL)


# The same stages and gates on fewer texts; the program itself is not changed.
FEWER: dict[str, dict[str, Any]] = {
    "extract": {"shuffled": 6},
    "validate": {"sweep_pairs": 4, "sweep_prompts": 4, "sweep_neutral": 4, "control_pairs": 4, "dose_prompts": 2},
    "compile": {"calibration": {"prompts": 72, "max_new_tokens": 32}},
    "verify": {"heldout": 12, "pairs": 16, "neutral": 8, "prompts": 8, "prompts_per_set": 1, "free_tokens": 4},
}
FEWER["validate"] |= {"few_shot": 0, "max_new_tokens": 16}
FEWER["verify"] |= {"capability": 2, "long": 0, "max_new_tokens": 24}


def readme_program() -> str:
    match = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert match is not None, "README.md has no program between its markers"
    return match[1]


def with_options(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The function with `options` in place of what the program gives."""
    return lambda *values, **named: function(*values, **{**named, **options})


def test_readme_program_ends_in_a_passed_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = readme_program()
    for name, changes in FEWER.items():
        monkeypatch.setattr(compile_steer, name, with_options(getattr(compile_steer, name), changes), raising=False)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), variables)
    parities = [value for value in variables.values() if isinstance(value, Parity)]
    assert parities, "the program keeps no result of verify"
    assert all(parity.passed for parity in parities), [parity.reasons for parity in parities]
