"""What weights changed: one tensor of base and other in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from compile_steer.artifacts.tensors import Checkpoint
from compile_steer.common.errors import ArtifactError
from compile_steer.common.progress import Advance
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, decompose, transpose_conv1d
from compile_steer.steering.patch import WeightPatch

# Above the largest singular value that rounding alone is expected to make, by so much.
_ABOVE_ROUNDING = 1.1


@dataclass(frozen=True)
class TensorChange:
    """One tensor that is not its base's.

    `norm` is Frobenius's, of the difference (of the whole tensor where one side has none), `relative` its share of
    the base's norm. `rank` counts the singular values above the audit's threshold times the largest, and above what
    rounding to the other's type makes by itself; `top` is the largest one's share of the square of all; None for what
    is no matrix. `cosine`, without sign, is of what a writer then writes most with the known vector at or below it.
    """

    name: str
    kind: Literal["changed", "added", "removed"]
    shape: tuple[int, ...]
    dtype: str
    norm: float
    relative: float | None = None
    rank: int | None = None
    top: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Top:
    """The largest part s u v^T of a matrix's difference, u [d_out] and v [d_in] unit, and what W has along them.

    `read` is u^T W [d_in], `written` W v [d_out], of the base's W; None where the base has no such tensor.
    """

    u: Tensor
    s: float
    v: Tensor
    read: Tensor | None
    written: Tensor | None


@dataclass(frozen=True)
class Difference:
    """A change with what is needed to recognise a direction in it: of a 1-d tensor the whole, of a matrix its top."""

    change: TensorChange
    module: str
    vector: Tensor | None = None
    top: Top | None = None


@dataclass
class Tally:
    """How many tensors were looked at, left alone, and left alone but for their type, as 'float32 to bfloat16'."""

    looked: int = 0
    same: int = 0
    recast: dict[str, int] = field(default_factory=dict)

    def count(self, before: Tensor, after: Tensor) -> None:
        if before.dtype == after.dtype:
            self.same += 1
        else:
            kind = f"{_type(before)} to {_type(after)}"
            self.recast[kind] = self.recast.get(kind, 0) + 1


class Names:
    """What tensors on disk are called in the causal language model, and how its modules hold them.

    Without a layout (an unknown family) every tensor has the name that it has on disk.
    """

    def __init__(self, layout: Layout | None) -> None:
        self._modules: dict[str, nn.Module] = {} if layout is None else dict(layout.model.named_modules())
        self._parameters = frozenset() if layout is None else frozenset(layout.model.state_dict())
        self._prefix = "" if layout is None else layout.model.base_model_prefix
        ends = () if layout is None else (layout.model.get_output_embeddings(), layout.model.get_input_embeddings())
        self.head, self.embeddings = (
            (next((f"{name}.weight" for name, module in self._modules.items() if module is end), "") for end in ends)
            if ends
            else ("", "")
        )

    def of(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The checkpoint's own names by the model's: what is saved without the head is saved without its prefix too."""
        return {self._full(name): name for name in checkpoint.files}

    def _full(self, name: str) -> str:
        prefixed = f"{self._prefix}.{name}"
        return prefixed if name not in self._parameters and prefixed in self._parameters else name

    def transpose_conv1d(self, module: str, matrix: Tensor) -> Tensor:
        """[d_out, d_in] of a module's weight."""
        return transpose_conv1d(self._modules[module], matrix) if module in self._modules else matrix


def of_checkpoints(
    base: Checkpoint, other: Checkpoint, names: Names, threshold: float, tally: Tally, advance: Advance
) -> Iterator[Difference]:
    """Every tensor of `other` against the base's of the same name, then what is gone; `tally` is kept up to date.

    A head that the base has not is held against its embeddings, which it shares.
    """
    before, after = names.of(base), names.of(other)
    for name in sorted(after):
        tally.looked += 1
        advance(1)
        new = _tensor(other, after[name])
        source = before.get(name) or (before.get(names.embeddings) if name == names.head else None)
        old = None if source is None else _tensor(base, source)
        if old is None or old.shape != new.shape:
            yield from _replaced(name, old, new)
        elif torch.equal(old.to(new.dtype), new):
            tally.count(old, new)
        else:
            whole = new.float() - old.float()
            found = _difference(name, old, whole, None, names, threshold, _rounding(old, new.dtype))
            yield replace(found, change=replace(found.change, dtype=_type(new)))
    for name in sorted(before.keys() - after.keys()):
        old = _tensor(base, before[name])
        shared = name == names.head and torch.equal(old, _tensor(base, before[names.embeddings]))
        if not shared:
            yield from _replaced(name, old, None)


def of_patch(
    base: Checkpoint, patch: WeightPatch, names: Names, threshold: float, advance: Advance
) -> Iterator[Difference]:
    """Everything that a patch adds, without summing it into the base.

    Raises:
        ArtifactError: the base lacks a matrix that the patch edits, or has it in another shape.
    """
    before = names.of(base)
    _require_fits(base, patch, names, before)
    for module in sorted({*patch.low_rank, *patch.dense}):
        advance(1)
        name = f"{module}.weight"
        old = base.tensor(before.get(name, name))
        yield _difference(name, old, patch.dense.get(module), patch.low_rank.get(module), names, threshold)
    for module, bias in sorted(patch.bias.items()):
        name = module if module in before else f"{module}.bias"
        old = base.tensor(before.get(name, name))
        if old is None:
            yield from _replaced(name, None, bias)
        else:
            yield _difference(name, old, bias, None, names, threshold)


def _require_fits(base: Checkpoint, patch: WeightPatch, names: Names, before: Mapping[str, str]) -> None:
    edited = {module: [len(edit.B), edit.A.shape[1]] for module, edit in patch.low_rank.items()}
    edited |= {module: list(names.transpose_conv1d(module, delta).shape) for module, delta in patch.dense.items()}
    problems = []
    for module, shape in sorted(edited.items()):
        old = base.tensor(before.get(f"{module}.weight", ""))
        found = "has none" if old is None else str(list(names.transpose_conv1d(module, old).shape))
        if found != str(shape):
            problems.append(f"{module}: the adapter's change is {shape}, the base {found}")
    if problems:
        more = f"; {len(problems) - 1} more like this" if len(problems) > 1 else ""
        raise ArtifactError(f"{problems[0]}{more}. Name the base that the adapter was made for.")


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    found = checkpoint.tensor(name)
    assert found is not None, "one of its own names"
    return found


def _replaced(name: str, old: Tensor | None, new: Tensor | None) -> Iterator[Difference]:
    """A tensor that only one side has, or that has another shape: gone, and there instead."""
    module = name.removesuffix(".bias").removesuffix(".weight")
    if old is not None:
        yield Difference(TensorChange(name, "removed", tuple(old.shape), _type(old), float(old.float().norm())), module)
    if new is not None:
        change = TensorChange(name, "added", tuple(new.shape), _type(new), float(new.float().norm()))
        yield Difference(change, module, vector=new.float() if new.ndim == 1 else None)


def _difference(
    name: str,
    old: Tensor | None,
    whole: Tensor | None,
    edit: LowRank | None,
    names: Names,
    threshold: float,
    rounding: float = 0.0,
) -> Difference:
    """`whole` and `edit` together as a change of `old`."""
    module = name.removesuffix(".bias").removesuffix(".weight")
    size = None if old is None else float(old.float().norm())
    shape = tuple(old.shape) if old is not None else tuple(whole.shape) if whole is not None else ()
    if edit is None and (whole is None or whole.ndim != 2):
        assert whole is not None, "a change has one of the two"
        norm = float(whole.float().norm())
        change = TensorChange(name, "changed", shape, _type(whole if old is None else old), norm, _share(norm, size))
        return Difference(change, module, vector=whole.float() if whole.ndim == 1 else None)
    U, S, V = decompose(None if whole is None else names.transpose_conv1d(module, whole), edit)
    rank = int((max(threshold * float(S[0]), _ABOVE_ROUNDING * rounding) < S).sum())
    kind = _type(old) if old is not None else "float32"
    norm = float(S.double().norm())
    W = None if old is None else names.transpose_conv1d(module, old.float())
    u, v = U[:, 0].clone(), V[0].clone()  # clones: the rest is let go
    top = Top(u, float(S[0]), v, None if W is None else u @ W, None if W is None else W @ v)
    held = None if norm == 0.0 else (float(S[0]) / norm) ** 2
    return Difference(TensorChange(name, "changed", shape, kind, norm, _share(norm, size), rank, held), module, top=top)


def _rounding(old: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value that rounding `old` to `dtype` is expected to make.

    Of independent errors of one size it is that size times sqrt(rows) + sqrt(columns) (Bai and Yin 1993).
    """
    if old.ndim != 2 or old.dtype == dtype:
        return 0.0
    error = (old.to(dtype).float() - old.float()).square().mean().sqrt()
    rows, columns = old.shape
    return float(error) * (math.sqrt(rows) + math.sqrt(columns))


def _share(norm: float, size: float | None) -> float | None:
    return norm / size if size else None


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
