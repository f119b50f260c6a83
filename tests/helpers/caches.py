"""A cache in which nothing of an earlier session is kept, but the user's models, which take long to make."""

from __future__ import annotations

import os
from pathlib import Path

from compile_steer.models.source import new_cache_folder


def use_own_cache(folder: Path) -> None:
    """Make `folder`, which exists, the cache of this process and those that it starts."""
    models = new_cache_folder() / "models"
    models.mkdir(exist_ok=True)
    (folder / "models").symlink_to(models)
    os.environ["COMPILE_STEER_CACHE"] = str(folder)
