"""What lowering yields: changes of weights and biases by module name, before any file format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.layout import Layout


@dataclass(frozen=True)
class LowRank:
    """W <- W + B A, with B [d_out, r] and A [r, d_in] in fp32."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def to(self, device: torch.device) -> LowRank:
        return LowRank(self.B.to(device), self.A.to(device))

    def padded(self, rank: int) -> LowRank:
        """The same edit with zero rows and columns up to `rank`."""
        extra = rank - self.rank
        if extra == 0:
            return self
        return LowRank(
            torch.cat([self.B, self.B.new_zeros(self.B.shape[0], extra)], dim=1),
            torch.cat([self.A, self.A.new_zeros(extra, self.A.shape[1])], dim=0),
        )

    def beside(self, other: LowRank) -> LowRank:
        """B A + B' A' as one edit of rank r + r'."""
        return LowRank(torch.cat([self.B, other.B], dim=1), torch.cat([self.A, other.A], dim=0))


@dataclass(frozen=True)
class WeightPatch:
    """Edits by the full name of the module in the causal language model.

    `bias` [d_out] is added to the module's bias, or, where the name is a parameter's, to each row of it (a mixture of
    experts); `switches` are the config fields (False to True)
    that make stock code build the biases where the checkpoint has none. `untie` gives the language-model
    head its own copy of the embeddings before they are edited. `architecture` is the stock family that the
    checkpoint is rewritten as ('' for its own). `dense` is added to the module's weight, whose shape and
    orientation it has.
    """

    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    bias: Mapping[str, Tensor] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    untie: bool = False
    architecture: str = ""
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        return max((edit.rank for edit in self.low_rank.values()), default=0)

    def first_layer(self, layout: Layout) -> int:
        """The first block that is edited; the number of blocks where none is."""
        edited = {*self.low_rank, *self.bias, *self.dense}
        return next((k for k in range(layout.n_layers) if edited & layout.linears(k).keys()), layout.n_layers)

    def __mul__(self, factor: float) -> WeightPatch:
        """The same change of the weights, `factor` times as large; -1 takes away what the patch gives."""
        low_rank = {name: LowRank(factor * edit.B, edit.A) for name, edit in self.low_rank.items()}
        bias = {name: factor * change for name, change in self.bias.items()}
        dense = {name: factor * change for name, change in self.dense.items()}
        return replace(self, low_rank=low_rank, bias=bias, dense=dense)

    __rmul__ = __mul__

    def __add__(self, other: WeightPatch) -> WeightPatch:
        """Both changes at once, exactly: ranks add up, and so do biases and whole weights.

        Raises:
            ArtifactError: the two rewrite the checkpoint as different architectures, or differ in shape.
        """
        architectures = sorted({self.architecture, other.architecture} - {""})
        mine, yours = self._shapes(), other._shapes()
        problems = [
            f"{name} is {list(mine[name])} in one patch and {list(yours[name])} in the other."
            for name in sorted(mine.keys() & yours.keys())
            if mine[name] != yours[name]
        ]
        if len(architectures) > 1:
            problems.append(
                f"one patch is for the base rewritten as {architectures[0]}, the other as {architectures[1]}."
            )
        if problems:
            raise ArtifactError([*problems, "Only patches of the same base can be added."])
        low_rank = dict(self.low_rank)
        for name, edit in other.low_rank.items():
            low_rank[name] = low_rank[name].beside(edit) if name in low_rank else edit
        return WeightPatch(
            low_rank,
            _sums(self.bias, other.bias),
            tuple(sorted({*self.switches, *other.switches})),
            self.untie or other.untie,
            "".join(architectures),
            _sums(self.dense, other.dense),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {f"{name} (low rank)": (len(edit.B), edit.A.shape[1]) for name, edit in self.low_rank.items()}
        biases = {f"{name} (bias)": tuple(change.shape) for name, change in self.bias.items()}
        return {**shapes, **biases, **{name: tuple(change.shape) for name, change in self.dense.items()}}

    def require_finite(self) -> None:
        """Raise `ArtifactError` naming every module whose edit is NaN or infinite."""
        bad = [n for n, e in self.low_rank.items() if not bool(torch.isfinite(e.B).all() and torch.isfinite(e.A).all())]
        whole = (*self.bias.items(), *self.dense.items())
        bad += [name for name, change in whole if not bool(torch.isfinite(change).all())]
        if bad:
            raise ArtifactError(f"the compiled weights of {', '.join(bad)} are not finite; nothing was written.")


def _sums(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shared = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return {**one, **other, **shared}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a Linear, or of GPT-2's Conv1D, which stores the transpose."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def weight_delta(module: nn.Module, edit: LowRank) -> Tensor:
    """B A in the orientation of `module.weight`."""
    return turned(module, edit.B @ edit.A)


def turned(module: nn.Module, matrix: Tensor) -> Tensor:
    """[d_out, d_in] <-> the orientation of `module.weight` (GPT-2's Conv1D stores [d_in, d_out])."""
    return matrix.T if isinstance(module, Conv1D) else matrix


@contextmanager
def applied(model: nn.Module, patch: WeightPatch) -> Iterator[None]:
    """Run `model` with `patch` on its modules' outputs, the weights untouched, inside the block."""
    layout = Layout.of(model)
    with ExitStack() as stack:
        for name, edit in patch.low_rank.items():
            module = layout.model.get_submodule(name)
            stack.callback(module.register_forward_hook(_low_rank_hook(edit)).remove)
        for name, bias in patch.bias.items():
            module = _shifted(layout.model, name)
            stack.callback(module.register_forward_hook(_bias_hook(bias)).remove)
        for name, delta in patch.dense.items():
            module = layout.model.get_submodule(name)
            stack.callback(module.register_forward_hook(_dense_hook(delta)).remove)
        yield


def _shifted(model: nn.Module, name: str) -> nn.Module:
    """The module whose output a bias shifts: the named one, or the mixture whose parameter is named."""
    named = name in dict(model.named_modules())
    return model.get_submodule(name if named else name.rpartition(".")[0])


def _low_rank_hook(edit: LowRank) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if isinstance(module, nn.Embedding):  # W is [tokens, d_model] there, and x the tokens
            return output + edit.B.to(output)[x] @ edit.A.to(output)
        return output + (x @ edit.A.to(x).T) @ edit.B.to(x).T

    return hook


def _bias_hook(bias: Tensor) -> Any:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + bias.to(output)

    return hook


def _dense_hook(delta: Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return output + delta.to(output)[args[0]]
        return output + args[0] @ turned(module, delta.to(output)).T

    return hook
