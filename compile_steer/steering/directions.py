"""The artifact between extraction and validation: one candidate direction per block, and its controls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from compile_steer.artifacts.files import parse_header
from compile_steer.artifacts.tensors import read_tensors, save_tensors
from compile_steer.common.errors import ArtifactError, brief
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import POINTS, Point, Site

if TYPE_CHECKING:
    from torch import Tensor

EVERY_BLOCK = -1
FROM_LABELS = "from shuffled labels"
_OTHER_POINTS = "other_points."  # and the point: names in the file
_CONTENT = "content_sha256"


def unit(vectors: Tensor) -> Tensor:
    """`vectors` [..., d] scaled to length 1; zero vectors stay zero."""
    length: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.clamp(min=1e-12)  # a zero vector means that the block has no direction


def as_long_as(vectors: Tensor, pattern: Tensor) -> Tensor:
    """`vectors` [..., L, d] scaled to the lengths of `pattern` [L, d]."""
    length: Tensor = pattern.norm(dim=-1, keepdim=True)
    return unit(vectors) * length


def _content_sha256(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    from safetensors.torch import save

    return hashlib.sha256(save(dict(tensors), {"directions": json.dumps(header, sort_keys=True)})).hexdigest()


@dataclass(frozen=True)
class Source:
    """The model that directions were extracted from, where it is not the one that they are for."""

    model: str
    revision: str


@dataclass(frozen=True)
class _Header:
    """What a file of directions has beside its tensors; the attributes of `Directions`."""

    model: str
    revision: str
    point: Point
    inputs: str
    operation: Literal["add", "clamp", "ablate"]
    joint: bool
    controls: str
    source: Source | None
    curves: dict[str, list[float]]


def _common(value: Any) -> dict[str, Any]:
    """The fields of `_Header`, of a header or of directions."""
    return {entry.name: getattr(value, entry.name) for entry in fields(_Header)}


@dataclass(frozen=True, repr=False)
class Directions:
    """One candidate direction a block, and the controls that a candidate has to beat.

    Attributes:
        vectors: [n_layers, d_model], in the activations' units; 0 where a block has none.
        shuffled: [n, n_layers, d_model], the controls: what the same method yields from labels without meaning, or
            what `controls` describes.
        point: where in the block they are read and applied.
        inputs: hash of what they were made from.
        operation: what they are for; `ablate` removes the candidate's direction from everything that the model writes.
        projections: [1 + n, n_layers], the value that a clamp gives to h.u, then that of each control.
        joint: one program has all blocks' directions at once, under the layer `EVERY_BLOCK`; otherwise each block is a
            candidate.
        other_points: [1 + n, n_layers, d_model] each, directions of more points of the same blocks, then each
            control's.
        curves: what training measured, one number an epoch.
    """

    vectors: Tensor
    shuffled: Tensor
    model: str
    revision: str
    point: Point
    inputs: str
    operation: Literal["add", "clamp", "ablate"] = "add"
    projections: Tensor | None = None
    joint: bool = False
    controls: str = FROM_LABELS
    other_points: Mapping[Point, Tensor] = field(default_factory=dict)
    source: Source | None = None
    curves: Mapping[str, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        n_layers, d_model = self.vectors.shape
        blocks = f"{len(self.layers)} of {n_layers} blocks"
        return f"Directions({self.operation} at {self.point}, {blocks}, d_model {d_model}, model {self.model!r})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a direction."""
        return tuple(int(k) for k in self.vectors.norm(dim=-1).nonzero()[:, 0])

    def program(self, layer: int, coefficient: float, positions: str) -> Program:
        """The candidate of block `layer`, or of every block that has one for `EVERY_BLOCK`.

        An ablation acts at all positions, whatever `positions` is.
        """
        if self.operation == "ablate":
            # One direction for the whole model: the stream is to hold it nowhere.
            everywhere = ablate_everywhere(unit(self.vectors[layer]), self.vectors.shape[0], coefficient)
            return Program(everywhere, self.model, self.revision)
        layers = self.layers if layer == EVERY_BLOCK else (layer,)
        parts = []
        for k in layers:
            site, vector = Site(k, self.point), self.vectors[k]
            if self.operation == "add":
                parts.append(Intervention(site, "add", vector, coefficient, positions))
            elif self.projections is None:
                raise ValueError("a clamp needs a projection a block")
            else:
                projection = float(self.projections[0, k])
                parts.append(Intervention(site, "clamp", unit(vector), coefficient, positions, projection))
        for point, vectors in self.other_points.items():
            parts += [Intervention(Site(k, point), "add", vectors[0, k], coefficient, positions) for k in layers]
        return Program(tuple(parts), self.model, self.revision)

    def control(self, index: int) -> Directions:
        """Control number `index` in the place of the real directions."""
        other_points = {point: vectors[[index + 1]] for point, vectors in self.other_points.items()}
        projections = None if self.projections is None else self.projections[[index + 1]]
        vectors, shuffled = self.shuffled[index], self.shuffled[:0]
        return replace(self, vectors=vectors, shuffled=shuffled, projections=projections, other_points=other_points)

    def save(self, path: str | Path, extra: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write safetensors with everything else, and `extra`, as JSON under metadata key `directions`.

        The JSON holds the content's own hash: `load` notices a file that was changed since.
        """
        header = {**extra, **asdict(_Header(**_common(self)))}
        tensors = {"directions": self.vectors.contiguous(), "shuffled": self.shuffled.contiguous()}
        tensors |= {f"{_OTHER_POINTS}{point}": vectors.contiguous() for point, vectors in self.other_points.items()}
        if self.projections is not None:
            tensors["projections"] = self.projections.contiguous()
        header[_CONTENT] = _content_sha256(tensors, header)
        save_tensors(Path(path), tensors, {"directions": json.dumps(header, sort_keys=True)})

    @staticmethod
    def load(path: str | Path) -> Directions:
        """Raises `ArtifactError` for a missing, damaged or foreign file, or one that was changed after it was written."""
        path = Path(path)
        tensors, metadata = read_tensors(path)
        remedy = "Make it with 'compile-steer extract'."
        header = parse_header(metadata, "directions", _Header, path, remedy)
        whole = json.loads(metadata["directions"])
        recorded = whole.pop(_CONTENT, "")  # older files have none
        if recorded not in ("", _content_sha256(tensors, whole)):
            raise ArtifactError(f"{path} was changed after it was written. Make it again with 'compile-steer extract'.")
        if not {"directions", "shuffled"} <= tensors.keys():
            raise ArtifactError(f"{path} holds no directions. {remedy}")
        points = {point: tensors[name] for point in POINTS if (name := f"{_OTHER_POINTS}{point}") in tensors}
        vectors, shuffled, projections = tensors["directions"], tensors["shuffled"], tensors.get("projections")
        # Of the real directions, or of these and then each control's.
        every = (1 + len(shuffled), *vectors.shape)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        needed = {
            "directions": vectors.shape[:2],
            "shuffled": (len(shuffled), *vectors.shape),
            "projections": every[:-1],
        }
        wrong = [name for name, shape in shapes.items() if tuple(shape) != tuple(needed.get(name, every))]
        if wrong or vectors.ndim != 2 or not all(tensor.is_floating_point() for tensor in tensors.values()):
            listed = ", ".join(f"{brief(name)} {list(shape)}" for name, shape in shapes.items())
            raise ArtifactError(
                f"{path}: the shapes or types of its tensors do not fit each other ({listed}). {remedy}"
            )
        return Directions(vectors, shuffled, projections=projections, other_points=points, **_common(header))
