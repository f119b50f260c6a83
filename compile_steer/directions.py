"""The artifact between extraction and validation: one candidate direction per block, and its controls."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compile_steer.errors import ArtifactError
from compile_steer.files import save_tensors
from compile_steer.program import Intervention, Point, Program, Site, read_tensors


@dataclass(frozen=True)
class Directions:
    """`vectors` [n_layers, d_model] in the activations' units; `shuffled` [n, n_layers, d_model], as long."""

    vectors: Tensor
    shuffled: Tensor
    model: str
    revision: str
    point: Point
    inputs: str

    def program(self, layer: int, coefficient: float, positions: str) -> Program:
        """The program that adds `coefficient` times the direction of block `layer` there."""
        add = Intervention(Site(layer, self.point), "add", self.vectors[layer], coefficient, positions)
        return Program((add,), self.model, self.revision)

    def save(self, path: Path) -> None:
        header = {"model": self.model, "revision": self.revision, "point": self.point, "inputs": self.inputs}
        tensors = {"directions": self.vectors.contiguous(), "shuffled": self.shuffled.contiguous()}
        save_tensors(path, tensors, {"directions": json.dumps(header, sort_keys=True)})

    @staticmethod
    def load(path: Path) -> Directions:
        """Raises `ArtifactError` for a missing, damaged or foreign file."""
        tensors, metadata = read_tensors(path)
        try:
            header = json.loads(metadata["directions"])
            return Directions(tensors["directions"], tensors["shuffled"], **header)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds no directions. Make it with 'compile-steer extract'.") from error
