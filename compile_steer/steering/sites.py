"""Where and when a model is read or steered: the points of a block, and the tokens that a program acts on.

This module does not import torch, so that options and reports can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from compile_steer.common.errors import ArtifactError

Point = Literal["resid_pre", "attn_out", "mlp_out", "resid_post"]
OperationName = Literal["add", "ablate", "clamp"]
Scope = Literal["all", "prompt", "response", "last_prompt"]

POINTS: tuple[Point, ...] = get_args(Point)
OPERATIONS: tuple[OperationName, ...] = get_args(OperationName)
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Site:
    """Where an activation is read or edited: 0-based block `layer`, and a `point` in it."""

    layer: int
    point: Point = "resid_post"

    def __post_init__(self) -> None:
        if self.point not in POINTS:
            raise ArtifactError(f"point '{self.point}' is unknown; choose one of {', '.join(POINTS)}.")
        if self.layer < 0:
            raise ArtifactError(f"layer {self.layer} is negative; blocks are counted from 0.")

    @property
    def changes_from(self) -> int:
        """The first block whose output an edit here changes."""
        # The input of block k is the output of block k - 1; block 0 has none before it.
        return max(self.layer - 1, 0) if self.point == "resid_pre" else self.layer

    def __str__(self) -> str:
        return f"{self.point} {self.layer}"


def parse_positions(text: str) -> frozenset[Scope]:
    """Parse 'all' or scopes joined by '+' ('last_prompt+response'); raises `ArtifactError`."""
    scopes = frozenset(part.strip() for part in text.split("+"))
    unknown = scopes - set(SCOPES)
    if unknown:
        raise ArtifactError(
            f"positions '{text}': {', '.join(sorted(unknown))} unknown; use {', '.join(SCOPES)}, joined by '+'."
        )
    if "all" in scopes or scopes >= {"prompt", "response"}:
        return frozenset(("all",))
    return frozenset(scope for scope in SCOPES if scope in scopes)
