"""Fixtures of the tests of several programs at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compile_steer.models.load import LoadedModel, load
from tests.helpers.composition import NAMES, CompositionCase
from tests.helpers.tiny import chat_tokenizer, intervention


@pytest.fixture
def case(saved: Callable[[str], LoadedModel], tmp_path: Path) -> CompositionCase:
    source = saved("llama").source
    chat_tokenizer().save_pretrained(source)
    return CompositionCase(tmp_path, load(source, device="cpu"))


@pytest.fixture
def two(case: CompositionCase) -> tuple[Path, Path]:
    """Two compiled behaviours, at blocks 1 and 3, with data of their own."""
    first = case.compiled(NAMES[0], case.program(intervention(layer=1, coefficient=0.4)), 0)
    return first, case.compiled(NAMES[1], case.program(intervention(layer=3, coefficient=-0.5, seed=1)), 20_000)
