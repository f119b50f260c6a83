"""One run on a tiny model for every test that looks at, or spoils, what a whole run leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.small_run import SmallRun, complete_run


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return complete_run(tmp_path_factory.mktemp("original"))


@pytest.fixture
def run(original: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    """A copy to spoil; the model stays where the recipe names it, which is in the current folder."""
    monkeypatch.chdir(original.root)
    for part in ("recipes", "runs"):
        shutil.copytree(original.root / part, tmp_path / part)
    return SmallRun(tmp_path)
