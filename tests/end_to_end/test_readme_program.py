"""The first Python program of the README runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compile_steer
from compile_steer.verification.parity import Parity
from tests.end_to_end.conftest import ROOT, SMALL

BLOCK = re.compile(r"<!-- program:start -->\n```python\n(.*?)```\n<!-- program:end -->", re.DOTALL)


# The same stages and gates on as few texts as the small run; the program itself is not changed.
FEWER: dict[str, dict[str, Any]] = {
    "extract": SMALL["extract"],
    "validate": SMALL["validate"],
    "compile": {"calibration": SMALL["compile"]["calibration"]},
    "verify": {key: value for key, value in SMALL["verify"].items() if key != "forms"} | {"long": 0},
}


def readme_program() -> str:
    match = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert match is not None, "README.md has no program between its markers"
    return match[1]


def with_options(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The function with `options` in place of what the program gives."""
    return lambda *values, **named: function(*values, **{**named, **options})


def test_readme_program_ends_in_a_verified_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in FEWER.items():
        monkeypatch.setattr(compile_steer, name, with_options(getattr(compile_steer, name), changes), raising=False)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(compile(readme_program(), "README.md", "exec"), variables)
    parity = variables["parity"]
    assert isinstance(parity, Parity) and parity.form == "adapter"
    assert (tmp_path / "ocean-adapter" / "adapter_model.safetensors").is_file()
    # The gates on behaviour are for as many texts as the program itself takes: on 8 pairs a sound adapter may miss them by
    # chance. These bounds hold for any sample, and no fault that the verifier's tests plant is within them.
    assert parity.divergence.kl_remaining.value < 0.03
    assert abs(parity.divergence.gain - 1) < 0.05
    assert parity.divergence.top1 > parity.divergence.top1_base + 0.2
    assert parity.file_error is not None and parity.file_error < 1e-4
