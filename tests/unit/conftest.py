"""One walk on a tiny model for every test that looks at, or spoils, what a whole run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.small_run import SmallRun, walked


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return walked(tmp_path_factory.mktemp("original"))


@pytest.fixture
def run(original: SmallRun, tmp_path: Path) -> SmallRun:
    """A copy to spoil; the model stays where the recipe names it."""
    for part in ("recipes", "runs"):
        shutil.copytree(original.root / part, tmp_path / part)
    return SmallRun(tmp_path)
