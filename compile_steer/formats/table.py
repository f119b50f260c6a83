"""Safetensors whose tensors are named `POINT.K`, such as `resid_post.14`: what pickles are converted to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from compile_steer.artifacts.tensors import read_tensors
from compile_steer.common.errors import ArtifactError
from compile_steer.formats.foreign import NUMBER, Foreign, Given
from compile_steer.steering.sites import POINTS, Point


def read(path: Path, _given: Given) -> Foreign:
    """The vectors of one point; raises `ArtifactError` for other names, several points, or a damaged file."""
    tensors, _metadata = read_tensors(path)
    matches = {name: re.fullmatch(rf"(\w+)\.{NUMBER}", name) for name in tensors}
    foreign = [name for name, found in matches.items() if found is None or found[1] not in POINTS]
    points: set[Point] = {point for point in get_args(Point) if any(name.startswith(f"{point}.") for name in matches)}
    if foreign or len(points) != 1:
        raise ArtifactError(
            f"{path} holds {', '.join(sorted(matches)) or 'nothing'}; needed: tensors named POINT.K, for example "
            f"resid_post.14 for the output of block 14, of one point ({', '.join(POINTS)})."
        )
    vectors = {int(found[2]): tensors[name].float() for name, found in matches.items() if found is not None}
    return Foreign(vectors, points.pop())
