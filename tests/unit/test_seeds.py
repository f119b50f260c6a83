"""Seeds are the same in every process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from tests.helpers.seeds import stable_seed

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("tests", "benchmarks", "compile_steer") for path in (ROOT / folder).rglob("*.py"))
# Hashes of whole numbers, which are the same everywhere.
ALLOWED = {"compile_steer/lowering/full.py"}


def test_the_seed_of_a_name_is_the_same_in_every_process() -> None:
    assert stable_seed("tests/unit/test_seeds.py::test") == 1334825182
    assert stable_seed("a") != stable_seed("b")


@pytest.mark.parametrize("repetition", [0, 1])
def test_global_generators_are_seeded_before_every_test(repetition: int) -> None:
    expected = torch.Generator().manual_seed(
        stable_seed(f"tests/unit/test_seeds.py::test_global_generators_are_seeded_before_every_test[{repetition}]")
    )
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))


def test_no_seed_comes_from_pythons_hash_of_a_string() -> None:
    calls = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hash"
    }
    assert calls <= ALLOWED
