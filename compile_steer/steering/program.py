"""The steering program: the intermediate representation that every stage reads.

One intervention is an affine edit of an activation h at a site, for some token positions:

    h <- h + c * (s - V (V^T h))        V [d_model, k] orthonormal or empty, s [d_model], c a scalar

`add` has V empty and s = v; `ablate` has V = u and s = 0; `clamp` has V = u and s = t*u. Every operation is therefore
linear in the coefficient c, and off at 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compile_steer.artifacts.files import parse_header, sha256
from compile_steer.artifacts.revision import other_revision
from compile_steer.artifacts.tensors import read_tensors, save_tensors
from compile_steer.common.errors import ArtifactError, brief, several
from compile_steer.steering.sites import OPERATIONS, OperationName, Point, Scope, Site, parse_positions

if TYPE_CHECKING:
    from torch import Tensor

_UNIT_TOLERANCE = 1e-3  # a unit vector that was rounded to bfloat16 is still one


@dataclass(frozen=True)
class _Entry:
    """An intervention in the header of a program's file; `tensor` names its vector there."""

    layer: int
    point: Point
    tensor: str
    operation: OperationName
    coefficient: float
    positions: str
    projection: float | None
    enabled: bool


@dataclass(frozen=True)
class _Header:
    model: str
    revision: str
    interventions: list[_Entry]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One affine edit.

    Attributes:
        vector: [d_model]; of any length for `add`, unit for `ablate` and `clamp`.
        coefficient: c above.
        positions: the tokens that are edited; see `parse_positions`.
        projection: the value that `clamp` gives to h.u, in the activation's own units; None for the other operations.
        enabled: False turns the intervention off and keeps its coefficient.
    """

    site: Site
    operation: OperationName
    vector: Tensor
    coefficient: float = 1.0
    positions: str = "all"
    projection: float | None = None
    enabled: bool = True
    scopes: frozenset[Scope] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Frozen, yet parsed once: hooks ask for the scopes in every forward pass.
        object.__setattr__(self, "scopes", parse_positions(self.positions))
        problems = list(self._problems())
        if problems:
            raise ArtifactError([f"intervention at {self.site}: {problem}" for problem in problems])

    def _problems(self) -> Iterable[str]:
        if self.operation not in OPERATIONS:
            yield f"operation '{self.operation}' is unknown; use one of {', '.join(OPERATIONS)}."
        if self.vector.ndim != 1 or not self.vector.is_floating_point():
            yield f"the vector has shape {list(self.vector.shape)} and type {self.vector.dtype}; needed: [d_model] floats."
        elif not bool(self.vector.isfinite().all()):
            yield "the vector holds NaN or infinity; extract it again (see 'dtype' if the model overflows)."
        elif self.operation != "add" and abs(float(self.vector.norm()) - 1.0) > _UNIT_TOLERANCE:
            yield f"'{self.operation}' needs a unit direction; found norm {float(self.vector.norm()):.4g}."
        if not math.isfinite(self.coefficient):
            yield f"coefficient {self.coefficient} is not a finite number."
        if self.projection is not None and not math.isfinite(self.projection):
            yield f"projection {self.projection} is not a finite number."
        if (self.operation == "clamp") != (self.projection is not None):
            yield "'clamp' needs a projection, and only 'clamp' takes one."

    def normal_form(self) -> tuple[Tensor | None, Tensor]:
        """Return (V [d_model, 1] or None, s [d_model]) of h + c (s - V V^T h), in fp32."""
        vector = self.vector.float()
        if self.operation == "add":
            return None, vector
        target = 0.0 if self.projection is None else self.projection
        return vector.unsqueeze(1), target * vector

    def describe(self) -> str:
        """Operation, coefficient, site, positions and norm in one line."""
        name = "add" if self.operation == "add" else f"{self.operation} (projection {self.projection or 0.0:g})"
        norm = f", ||c v|| = {abs(self.coefficient) * float(self.vector.norm()):.3g}" if self.operation == "add" else ""
        off = "" if self.enabled else " [off]"
        return f"{name} {self.coefficient:+g} at {self.site}, positions {self.positions}{norm}{off}"


def ablate_everywhere(direction: Tensor, n_layers: int, coefficient: float = 1.0) -> tuple[Intervention, ...]:
    """Ablate a unit `direction` [d_model] at the embeddings and at every write to the stream of `n_layers` blocks.

    With coefficient 1 the stream then never holds it, at any point (Arditi et al. 2406.11717).
    """
    sites = [Site(0, "resid_pre"), *(Site(k, point) for k in range(n_layers) for point in ("attn_out", "mlp_out"))]
    return tuple(Intervention(site, "ablate", direction, coefficient) for site in sites)


@dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A tuple of interventions for one model. `model` and `revision` name what it was made for."""

    interventions: tuple[Intervention, ...]
    model: str
    revision: str

    def __repr__(self) -> str:
        return f"Program for {self.model!r}: {self.describe()}"

    def __post_init__(self) -> None:
        widths = {int(i.vector.shape[0]) for i in self.interventions}
        if len(widths) > 1:
            raise ArtifactError(f"the interventions are for widths {sorted(widths)}; a program has one d_model.")

    @property
    def active(self) -> tuple[Intervention, ...]:
        """The interventions that are enabled and have an effect."""
        return tuple(i for i in self.interventions if i.enabled and i.coefficient != 0.0)

    @property
    def shape(self) -> tuple[tuple[Site, OperationName, frozenset[Scope]], ...]:
        """Sites, operations and positions of what is enabled: programs of one shape can be rows of one batch."""
        return tuple((i.site, i.operation, i.scopes) for i in self.interventions if i.enabled)

    @property
    def first_layer(self) -> int:
        """The first block whose output differs from the base's (the input of block k is block k-1's output)."""
        return min(self.changed_blocks, default=0)

    @property
    def changed_blocks(self) -> frozenset[int]:
        """The blocks in which an intervention changes the output first."""
        return frozenset(i.site.changes_from for i in self.active)

    @property
    def by_role(self) -> bool:
        """Whether some tokens are left alone for what they are in the conversation."""
        return any("all" not in one.scopes for one in self.active)

    def at_block(self, block: int) -> tuple[Intervention, ...]:
        """The interventions that change what `block` computes."""
        return tuple(one for one in self.interventions if one.site.changes_from == block)

    def adds_constant(self, block: int) -> bool:
        """Whether all that is changed in `block` is a constant, added to every token; false where nothing is."""
        here = self.at_block(block)
        return bool(here) and all(one.operation == "add" and "all" in one.scopes for one in here)

    def reads_stream(self, block: int) -> bool:
        """Whether something that is changed in `block` depends on what the stream holds there."""
        return any(one.operation != "add" for one in self.at_block(block))

    def adds_to(self, block: int) -> frozenset[Scope]:
        """The positions at which `block` adds a constant, where that is all it changes; empty for every token, or none."""
        here = self.at_block(block)
        scopes = {one.scopes for one in here}
        alike = len(scopes) == 1 and all(one.operation == "add" for one in here)
        return scopes.pop() if alike and "all" not in here[0].scopes else frozenset()

    def scaled(self, factor: float, index: int | None = None) -> Program:
        """Multiply every coefficient, or only that of intervention `index`, by `factor`."""
        return self._map(lambda i: replace(i, coefficient=i.coefficient * factor), index)

    def toggled(self, index: int, on: bool) -> Program:
        """Turn intervention `index` on or off; its coefficient is kept."""
        return self._map(lambda i: replace(i, enabled=on), index)

    def _map(self, change: Any, index: int | None) -> Program:
        numbers = range(len(self.interventions))
        chosen = numbers if index is None else [numbers[index]]  # an index that is not there raises
        return replace(
            self, interventions=tuple(change(i) if n in chosen else i for n, i in enumerate(self.interventions))
        )

    def __neg__(self) -> Program:
        return self.scaled(-1.0)

    def __mul__(self, factor: float) -> Program:
        return self.scaled(factor)

    __rmul__ = __mul__

    def __add__(self, other: Program) -> Program:
        """Run `self`, then `other`; refuses a program made for another model."""
        other.require(self.model, self.revision)
        return replace(self, interventions=self.interventions + other.interventions)

    def require(self, model: str, revision: str, d_model: int | None = None, n_layers: int | None = None) -> None:
        """Raise `ArtifactError` with every reason why this program does not belong to that model."""
        problems = []
        if different := other_revision(self.revision, revision):
            problems.append(
                f"the program was made for '{self.model}', revision {self.revision}; found '{model}', revision {revision}: "
                f"{different}."
            )
        for i in self.interventions:
            if d_model is not None and i.vector.shape[0] != d_model:
                problems.append(f"the vector at {i.site} has width {i.vector.shape[0]}; the model has {d_model}.")
            if n_layers is not None and i.site.layer >= n_layers:
                problems.append(f"layer {i.site.layer} does not exist: the model has blocks 0 to {n_layers - 1}.")
        if problems:
            raise ArtifactError([*problems, "Extract the vector from this model, or load the one it was made for."])

    def describe(self) -> str:
        """The program as text, one intervention a line; more than 8 that differ only in their site are one line."""
        lines = [i.describe() for i in self.interventions]
        kinds = {line.replace(f" at {i.site},", ",") for line, i in zip(lines, self.interventions, strict=True)}
        if len(lines) > 8 and len(kinds) == 1:
            first, last = self.interventions[0].site, self.interventions[-1].site
            return f"{kinds.pop()}: at {len(lines)} sites from {first} to {last}"
        return "\n".join(lines) or "(empty program)"

    def save(self, path: str | Path, extra: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write safetensors with the JSON list of interventions, and `extra` (JSON), under metadata key `program`."""
        save_tensors(Path(path), *self._serialized(extra))

    @property
    def sha256(self) -> str:
        """SHA-256 of the file that the program was loaded from, or else of the one that `save` writes without `extra`."""
        from safetensors.torch import save

        if "_file_sha256" in vars(self):
            return str(vars(self)["_file_sha256"])
        return hashlib.sha256(save(*self._serialized({}))).hexdigest()

    def _serialized(self, extra: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata of the file."""
        # One metadata key only: several are written in no fixed order, and equal programs must be equal files.
        # clone: ablation everywhere holds one tensor many times, and safetensors refuses shared memory.
        tensors = {f"intervention.{n}": i.vector.float().clone() for n, i in enumerate(self.interventions)}
        entries = [
            _Entry(i.site.layer, i.site.point, name, i.operation, i.coefficient, i.positions, i.projection, i.enabled)
            for name, i in zip(tensors, self.interventions, strict=True)
        ]
        header = {**extra, **asdict(_Header(self.model, self.revision, entries))}
        return tensors, {"program": json.dumps(header, sort_keys=True)}

    @staticmethod
    def load(path: str | Path) -> Program:
        """Read a program; raises `ArtifactError` for a missing, damaged or foreign file."""
        path = Path(path)
        tensors, metadata = read_tensors(path)
        header = parse_header(metadata, "program", _Header, path, "Make it again with 'compile-steer validate'.")
        missing = [entry.tensor for entry in header.interventions if entry.tensor not in tensors]
        if missing:
            lines = [f"{path}: tensor {brief(name)} is named by the program but not in the file." for name in missing]
            raise ArtifactError(several(lines))
        try:
            interventions = []
            for entry in header.interventions:
                site, vector = Site(entry.layer, entry.point), tensors[entry.tensor]
                strength = entry.coefficient, entry.positions, entry.projection, entry.enabled
                interventions.append(Intervention(site, entry.operation, vector, *strength))
            program = Program(tuple(interventions), header.model, header.revision)
            # The file may say more than the program, and artifacts record the hash of the file. No field: a program that
            # is scaled or added to another is another program.
            object.__setattr__(program, "_file_sha256", sha256(path))
            return program
        except ArtifactError as error:
            raise ArtifactError([f"{path}: {problem}" for problem in error.problems]) from error
