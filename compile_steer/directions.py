"""The artifact between extraction and validation: one candidate direction per block, and its controls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from compile_steer.errors import ArtifactError
from compile_steer.files import save_tensors
from compile_steer.program import Intervention, Point, Program, Site, read_tensors

EVERY_BLOCK = -1


@dataclass(frozen=True)
class Directions:
    """`vectors` [n_layers, d_model] in the activations' units; `shuffled` [n, n_layers, d_model], as long.

    `operation` is what they are for; a clamp gives h.u the value `projections` [n_layers] of its block. Of `joint`
    directions one program holds all blocks' at once, under the layer `EVERY_BLOCK`; otherwise each is a candidate.
    """

    vectors: Tensor
    shuffled: Tensor
    model: str
    revision: str
    point: Point
    inputs: str
    operation: Literal["add", "clamp"] = "add"
    projections: Tensor | None = None
    joint: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a direction."""
        return tuple(int(k) for k in self.vectors.norm(dim=-1).nonzero()[:, 0])

    def program(self, layer: int, coefficient: float, positions: str) -> Program:
        """The candidate of block `layer`, or of `EVERY_BLOCK`, with the dial at `coefficient`."""
        layers = range(self.vectors.shape[0]) if layer == EVERY_BLOCK else [layer]
        parts = tuple(self._intervention(k, coefficient, positions) for k in layers)
        return Program(parts, self.model, self.revision)

    def _intervention(self, layer: int, coefficient: float, positions: str) -> Intervention:
        site, vector = Site(layer, self.point), self.vectors[layer]
        if self.operation == "add":
            return Intervention(site, "add", vector, coefficient, positions)
        if self.projections is None:
            raise ValueError("a clamp needs a projection a block")
        projection = float(self.projections[layer])
        return Intervention(site, "clamp", vector / vector.norm(), coefficient, positions, projection)

    def save(self, path: Path) -> None:
        header = {
            "model": self.model,
            "revision": self.revision,
            "point": self.point,
            "inputs": self.inputs,
            "operation": self.operation,
            "joint": self.joint,
        }
        tensors = {"directions": self.vectors.contiguous(), "shuffled": self.shuffled.contiguous()}
        if self.projections is not None:
            tensors["projections"] = self.projections.contiguous()
        save_tensors(path, tensors, {"directions": json.dumps(header, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> Directions:
        """Raises `ArtifactError` for a missing, damaged or foreign file."""
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata["directions"])
            vectors, shuffled = tensors["directions"], tensors["shuffled"]
            return Directions(vectors, shuffled, projections=tensors.get("projections"), **header)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds no directions. Make it with 'compile-steer extract'.") from error
