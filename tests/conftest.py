"""One thread: the tests share a machine with others, and tiny matrices gain nothing from more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from compile_steer.models.load import LoadedModel
from tests.helpers import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Give the tiny model of a family, saved to disk once a session."""

    @cache
    def save(family: str) -> LoadedModel:
        return tiny.saved(family, tmp_path_factory.mktemp(family))

    return save
