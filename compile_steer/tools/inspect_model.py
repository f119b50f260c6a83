"""What was measured on a model, and what compiles exactly on it: the table of `compile-steer inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compile_steer.common.errors import LayoutError
from compile_steer.lowering.plan import BACKENDS
from compile_steer.steering.layout import NATIVE, Layout
from compile_steer.steering.measure import ProjectionKind
from compile_steer.steering.passes import canonical
from compile_steer.steering.program import Intervention, Program, ablate_everywhere
from compile_steer.steering.sites import OPERATIONS, OperationName, Point, Site

_SUBLAYERS: dict[Point, ProjectionKind] = {"attn_out": "attn", "mlp_out": "mlp"}
FITTED = tuple(name for name, backend in BACKENDS.items() if backend.fitted)


@dataclass(frozen=True)
class Exactness:
    """What compiles a program exactly: the first exact backend that does not refuse, or why each of them refuses."""

    backend: str | None
    refusals: Mapping[str, str]


@dataclass(frozen=True)
class PointRow:
    """One point of a kind of block; module names are relative to the block.

    Attributes:
        module: whose output it is; '' for the block itself.
        projection: the matrix that writes it, or why there is none.
        norm: the norm between projection and stream, or None.
        multiplier: what the block multiplies it by before it is added to the stream.
        bias: 'native', the config flag that gives the projection one, the experts' own parameter, or None.
        missing: why the point is not there; nothing else is then said of it.
        exact: for a shift, an ablation and a clamp at every position, what compiles it exactly.
    """

    point: Point
    module: str = ""
    projection: str = ""
    norm: str | None = None
    multiplier: float = 1.0
    bias: str | None = None
    missing: str | None = None
    exact: Mapping[OperationName, Exactness] | None = None


@dataclass(frozen=True)
class BlockKind:
    """Blocks that have the same points, written by the same modules."""

    layers: tuple[int, ...]
    kind: str
    points: tuple[PointRow, ...]


@dataclass(frozen=True)
class Inspection:
    """The layout of a model, and what compiles exactly on it.

    Attributes:
        blocks: the name of the list of blocks.
        tied: the head is the token embedding itself.
        everywhere: of an ablation at the embeddings and at every projection, which takes a direction out of the stream.
        fitted: the backends that fit any program at the points that are there.
    """

    architecture: str
    model_type: str
    blocks: str
    n_layers: int
    d_model: int
    embeddings: tuple[str, ...]
    tied: bool
    kinds: tuple[BlockKind, ...]
    everywhere: Exactness
    fitted: tuple[str, ...] = FITTED


def inspect_layout(layout: Layout) -> Inspection:
    """Ask every exact backend about every operation at every point of every kind of block."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for layer, block in enumerate(layout.blocks):
        sublayers = layout.measured.sublayers[layer]
        biases = tuple(layout.bias_flag(layer, kind) for kind in sublayers)
        kinds.setdefault((type(block).__name__, tuple(sublayers.items()), biases), []).append(layer)
    rows = []
    for layers in kinds.values():
        points = tuple(_row(layout, layers[0], point) for point in ("attn_out", "mlp_out", "resid_post"))
        rows.append(BlockKind(tuple(layers), type(layout.blocks[layers[0]]).__name__, points))
    everywhere = Program(ablate_everywhere(_direction(layout), layout.n_layers), "", "")
    return Inspection(
        architecture=type(layout.model).__name__,
        model_type=layout.model.config.model_type,
        blocks=layout.measured.blocks,
        n_layers=layout.n_layers,
        d_model=layout.d_model,
        embeddings=layout.embeddings,
        tied=layout.tied,
        kinds=tuple(rows),
        everywhere=exactness(layout, everywhere),
    )


def exactness(layout: Layout, program: Program) -> Exactness:
    """The first exact backend that compiles the program, with what each of the others has against it."""
    program = canonical(program)
    refusals: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if not backend.fitted:
            refusal = backend.refusal(program, layout)
            if refusal is None:
                return Exactness(name, refusals)
            refusals[name] = refusal
    return Exactness(None, refusals)


def _direction(layout: Layout) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(0), layout.d_model).float()


def _row(layout: Layout, layer: int, point: Point) -> PointRow:
    try:
        layout.hook_module(Site(layer, point))
    except LayoutError as error:
        return PointRow(point, missing=str(error))
    exact = {}
    for operation in OPERATIONS:
        target = 1.0 if operation == "clamp" else None
        intervention = Intervention(
            Site(layer, point), operation, _direction(layout), 1.0, positions="all", projection=target
        )
        exact[operation] = exactness(layout, Program((intervention,), "", ""))
    kind = _SUBLAYERS.get(point)
    if kind is None:
        return PointRow(point, exact=exact)
    sublayer = layout.sublayer(layer, kind)
    if sublayer.projection is None:
        projection, bias = layout.no_projection(layer, kind), layout.expert_bias(layer) if kind == "mlp" else None
    else:
        beside = "" if sublayer.alone else ", beside routed experts"
        projection, bias = f"{sublayer.projection}{beside}", layout.bias_flag(layer, kind)
    return PointRow(point, sublayer.point, projection, sublayer.norm, sublayer.multiplier, bias, exact=exact)


def ranges(layers: tuple[int, ...]) -> str:
    """Numbers of blocks as text: '0-2, 4'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def bias_text(bias: str | None) -> str:
    """What is said of a bias in a table."""
    return "none" if bias is None else "now" if bias == NATIVE else f"by {bias}"
