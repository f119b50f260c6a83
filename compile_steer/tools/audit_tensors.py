"""Which weights changed, and by how much: at most one tensor of each side is in memory at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
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

# A singular value must be this much above the largest that rounding alone is expected to make.
_ABOVE_ROUNDING = 1.1


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs from the base's."""

    name: str
    kind: Literal["changed", "added", "removed"]
    shape: tuple[int, ...]
    dtype: str
    norm: float  # Frobenius, of the difference; of the whole tensor where one side has none
    relative: float | None = None  # over the norm of the base's tensor
    rank: int | None = None  # singular values above threshold x largest and above rounding; None: no matrix
    top: float | None = None  # fraction of the squared norm in the largest singular value
    cosine: float | None = None  # absolute, of what an output projection writes most with the known vector


@dataclass(frozen=True)
class TopPart:
    """The largest part s u v^T of a matrix's difference, with unit u [d_out] and v [d_in].

    `read` = u^T W [d_in] and `written` = W v [d_out] are of the base's W; None where the base has no such tensor.
    """

    u: Tensor
    s: float
    v: Tensor
    read: Tensor | None
    written: Tensor | None


@dataclass(frozen=True)
class Difference:
    """A change with what is needed to recognise a direction in it: `vector` of a 1-d tensor, `top` of a matrix."""

    change: TensorChange
    module: str
    vector: Tensor | None = None
    top: TopPart | None = None


@dataclass
class Unchanged:
    """How many tensors were compared, are equal, and are equal but for their type ('float32 to bfloat16')."""

    compared: int = 0
    same: int = 0
    recast: Counter[str] = field(default_factory=Counter)


class TensorNames:
    """The names of tensors on disk in the causal language model, and the orientation in which its modules store them.

    Without a layout (an unknown family) every tensor keeps its name on disk.
    """

    def __init__(self, layout: Layout | None) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._parameters: frozenset[str] = frozenset()
        self._prefix = self.head = self.embeddings = ""
        if layout is not None:
            model = layout.model
            self._modules, self._prefix = dict(model.named_modules()), model.base_model_prefix
            self._parameters = frozenset(model.state_dict())
            names = {module: f"{name}.weight" for name, module in self._modules.items()}
            self.head = names.get(model.get_output_embeddings(), "")
            self.embeddings = names.get(model.get_input_embeddings(), "")

    def of(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The names in the checkpoint's files, by the model's names: a base saved without its head lacks the prefix."""
        full = {}
        for name in checkpoint.files:
            prefixed = f"{self._prefix}.{name}"
            full[prefixed if name not in self._parameters and prefixed in self._parameters else name] = name
        return full

    def transpose_conv1d(self, module: str, matrix: Tensor) -> Tensor:
        """The module's weight as [d_out, d_in]."""
        return transpose_conv1d(self._modules[module], matrix) if module in self._modules else matrix


def compare_checkpoints(
    base: Checkpoint, other: Checkpoint, names: TensorNames, threshold: float, unchanged: Unchanged, advance: Advance
) -> Iterator[Difference]:
    """Yield every tensor of `other` that differs from the base's of the same name, then those that are gone.

    Counts the rest in `unchanged`. A head that the base lacks is compared with its embeddings, which the two share.
    """
    before, after = names.of(base), names.of(other)
    for name in sorted(after):
        unchanged.compared += 1
        advance(1)
        new = _tensor(other, after[name])
        source = before.get(name) or (before.get(names.embeddings) if name == names.head else None)
        old = None if source is None else _tensor(base, source)
        if old is None or old.shape != new.shape:
            if old is not None:
                yield _only_on_one_side(name, "removed", old)
            yield _only_on_one_side(name, "added", new)
        elif not torch.equal(old.to(new.dtype), new):
            delta = new.float() - old.float()  # in fp32: a difference of two bf16 tensors is rounded again in bf16
            difference = _difference(name, old, delta, None, names, threshold, _rounding(old, new.dtype))
            yield replace(difference, change=replace(difference.change, dtype=_dtype(new)))
        elif old.dtype == new.dtype:
            unchanged.same += 1
        else:
            unchanged.recast[f"{_dtype(old)} to {_dtype(new)}"] += 1
    for name in sorted(before.keys() - after.keys()):
        old = _tensor(base, before[name])
        if not (name == names.head and torch.equal(old, _tensor(base, before[names.embeddings]))):
            yield _only_on_one_side(name, "removed", old)


def compare_patch(
    base: Checkpoint, patch: WeightPatch, names: TensorNames, threshold: float, advance: Advance
) -> Iterator[Difference]:
    """Yield everything that a patch adds, without summing it; raises `ArtifactError` where it does not fit the base."""
    before = names.of(base)
    edited = {module: [len(edit.B), edit.A.shape[1]] for module, edit in patch.low_rank.items()}
    edited |= {module: list(names.transpose_conv1d(module, delta).shape) for module, delta in patch.dense.items()}
    problems = []
    for module, shape in sorted(edited.items()):  # all of them first: half an audit is of no use
        old = base.tensor(before.get(f"{module}.weight", ""))
        held = "has none" if old is None else str(list(names.transpose_conv1d(module, old).shape))
        if held != str(shape):
            problems.append(f"{module}: the adapter's change is {shape}, the base {held}")
    if problems:
        more = f"; {len(problems) - 1} more like this" if len(problems) > 1 else ""
        raise ArtifactError(f"{problems[0]}{more}. Name the base that the adapter was made for.")

    for module in sorted(edited):
        advance(1)
        name = f"{module}.weight"
        old = base.tensor(before.get(name, name))
        yield _difference(name, old, patch.dense.get(module), patch.low_rank.get(module), names, threshold)
    for module, bias in sorted(patch.bias.items()):
        name = module if module in before else f"{module}.bias"  # a mixture of experts names the parameter itself
        old = base.tensor(before.get(name, name))
        if old is None:
            yield _only_on_one_side(name, "added", bias)
        else:
            yield _difference(name, old, bias, None, names, threshold)


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensor(name)
    assert tensor is not None, "one of its own names"
    return tensor


def _module(name: str) -> str:
    return name.removesuffix(".bias").removesuffix(".weight")


def _only_on_one_side(name: str, kind: Literal["added", "removed"], tensor: Tensor) -> Difference:
    change = TensorChange(name, kind, tuple(tensor.shape), _dtype(tensor), float(tensor.float().norm()))
    return Difference(change, _module(name), tensor.float() if kind == "added" and tensor.ndim == 1 else None)


def _difference(
    name: str,
    old: Tensor | None,
    delta: Tensor | None,
    edit: LowRank | None,
    names: TensorNames,
    threshold: float,
    rounding: float = 0.0,
) -> Difference:
    """`delta` and `edit` together as a change of `old`; one of the two is there."""
    module = _module(name)
    size = None if old is None else float(old.float().norm())
    like = old if old is not None else delta
    shape, dtype = ((), "float32") if like is None else (tuple(like.shape), _dtype(like))
    if edit is None and delta is not None and delta.ndim != 2:
        norm = float(delta.float().norm())
        change = TensorChange(name, "changed", shape, dtype, norm, norm / size if size else None)
        return Difference(change, module, vector=delta.float() if delta.ndim == 1 else None)
    U, S, V = decompose(None if delta is None else names.transpose_conv1d(module, delta), edit)
    norm, largest = float(S.double().norm()), float(S[0])  # the Frobenius norm is that of the singular values
    W = None if old is None else names.transpose_conv1d(module, old.float())
    u, v = U[:, 0].clone(), V[0].clone()  # clones, or they would keep all of U and V in memory
    change = TensorChange(
        name,
        "changed",
        shape,
        "float32" if old is None else dtype,
        norm,
        relative=norm / size if size else None,
        rank=int((max(threshold * largest, _ABOVE_ROUNDING * rounding) < S).sum()),
        top=None if norm == 0.0 else (largest / norm) ** 2,
    )
    top = TopPart(u, largest, v, None if W is None else u @ W, None if W is None else W @ v)
    return Difference(change, module, top=top)


def _rounding(old: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value that rounding `old` to `dtype` is expected to make.

    For independent errors of one size it is that size times sqrt(rows) + sqrt(columns) (Bai and Yin 1993).
    """
    if old.ndim != 2 or old.dtype == dtype:
        return 0.0
    error = (old.to(dtype).float() - old.float()).square().mean().sqrt()
    rows, columns = old.shape
    return float(error) * (math.sqrt(rows) + math.sqrt(columns))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
