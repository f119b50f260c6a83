"""One run on a tiny model for every test that looks at, or spoils, what a whole run leaves; and cases for the verifier."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun, complete_run
from tests.helpers.verification import VerifierCase


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


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VerifierCase:
    """A small case for the verifier, with the module's SETTINGS of `verify`."""
    return VerifierCase.of(tmp_path_factory.mktemp("case"), **getattr(request.module, "SETTINGS", {}))


@pytest.fixture(scope="module")
def exact(case: VerifierCase) -> Parity:
    return case.parity_of(case.merged())
