"""The same result on every machine: one thread, no network, a fixed terminal width, fixed seeds, fixed examples."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Read by libraries when they are imported, and handed on to the processes that tests start.
os.environ |= {"COLUMNS": "132", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false"}

import hypothesis
import numpy as np
import pytest
import torch

from compile_steer.models.load import LoadedModel
from tests.helpers import tiny
from tests.helpers.caches import use_own_cache
from tests.helpers.seeds import stable_seed

# Other work shares the machine, and tiny matrices gain nothing from more threads. The order of a sum depends on their number.
torch.set_num_threads(1)

# By default every run tries the same examples, so that a failure comes from the change under test. `make test-nightly` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=25)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Nothing that an earlier session measured is taken for measured in this one, and the user's own is left alone. All processes of
# a session share one cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    session_cache = Path(tempfile.mkdtemp(prefix="compile-steer-tests-"))
    atexit.register(shutil.rmtree, session_cache, ignore_errors=True)
    use_own_cache(session_cache)


@pytest.fixture(autouse=True)
def fixed_seeds(request: pytest.FixtureRequest) -> None:
    """Seed the global generators by the test's name: what it draws does not depend on the tests before it."""
    seed = stable_seed(request.node.nodeid)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    """Give the tiny model of a family, saved to disk once a session."""

    @cache
    def save(family: str) -> LoadedModel:
        return tiny.saved(family, tmp_path_factory.mktemp(family))

    return save
