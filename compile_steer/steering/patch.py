"""What lowering yields: changes of weights and biases by module name, before any file format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from compile_steer.common.errors import ArtifactError
from compile_steer.steering.layout import Layout
from compile_steer.steering.low_rank import LowRank, decompose, transpose_conv1d


@dataclass(frozen=True, repr=False)
class WeightPatch:
    """Edits by the full name of the module in the causal language model. `with_patch` runs a model under them.

    Attributes:
        low_rank: B A is added to the module's weight.
        bias: [d_out], added to the module's bias or, where the name is a parameter's, to each row of it (a mixture of
            experts).
        config_flags: fields of the model's config, False to True, that make stock code build the biases where the
            checkpoint has none.
        untie: the language-model head gets its own copy of the embeddings before they are edited.
        architecture: the stock family that the checkpoint is rewritten as; '' for its own.
        dense: added to the module's weight, whose shape and orientation it has.
    """

    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    bias: Mapping[str, Tensor] = field(default_factory=dict)
    config_flags: tuple[str, ...] = ()
    untie: bool = False
    architecture: str = ""
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        parts = {"low rank": self.low_rank, "dense": self.dense, "bias": self.bias}
        edits = ", ".join(f"{len(edits)} {name}" for name, edits in parts.items() if edits)
        rewritten = f", rewritten as {self.architecture}" if self.architecture else ""
        return f"WeightPatch({edits or 'no edit'}{f', rank {self.max_rank}' if self.low_rank else ''}{rewritten})"

    @property
    def max_rank(self) -> int:
        return max((edit.rank for edit in self.low_rank.values()), default=0)

    @property
    def matrices(self) -> list[str]:
        """The modules whose weight is changed, sorted."""
        return sorted({*self.low_rank, *self.dense})

    def first_layer(self, layout: Layout) -> int:
        """The first block that is edited; the number of blocks where none is."""
        # Edits of the embeddings do not count: they are in no block.
        edited = {*self.low_rank, *self.bias, *self.dense}
        return next((k for k in range(layout.n_layers) if edited & layout.linears(k).keys()), layout.n_layers)

    def __mul__(self, factor: float) -> WeightPatch:
        """The same change of the weights, `factor` times as large; -1 takes away what the patch gives."""
        # One factor of each pair: scaling both would square the factor.
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
        mine, theirs = self._shapes(), other._shapes()
        problems = [
            f"{name} is {list(mine[name])} in one patch and {list(theirs[name])} in the other."
            for name in sorted(mine.keys() & theirs.keys())
            if mine[name] != theirs[name]
        ]
        if len(architectures) > 1:
            first, second = architectures
            problems.append(f"one patch is for the base rewritten as {first}, the other as {second}.")
        if problems:
            raise ArtifactError([*problems, "Only patches of the same base can be added."])
        return WeightPatch(
            _sums(self.low_rank, other.low_rank),
            _sums(self.bias, other.bias),
            tuple(sorted({*self.config_flags, *other.config_flags})),
            self.untie or other.untie,
            "".join(architectures),
            _sums(self.dense, other.dense),
        )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {f"{name} (low rank)": (len(edit.B), edit.A.shape[1]) for name, edit in self.low_rank.items()}
        biases = {f"{name} (bias)": tuple(change.shape) for name, change in self.bias.items()}
        return {**shapes, **biases, **{name: tuple(change.shape) for name, change in self.dense.items()}}

    def decompose(self, name: str, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """`low_rank.decompose` of the total change of the weight of module `name`."""
        dense = self.dense.get(name)
        if dense is not None:
            dense = transpose_conv1d(layout.model.get_submodule(name), dense)
        return decompose(dense, self.low_rank.get(name))

    def truncated(self, rank: int, layout: Layout) -> WeightPatch:
        """Every matrix that was changed at a higher rank, at its best approximation of `rank` (Eckart and Young)."""
        low_rank = dict(self.low_rank)
        for name in self.matrices:
            if name in self.dense or low_rank[name].rank > rank:
                U, S, V = self.decompose(name, layout)
                # contiguous: slices would keep the whole U and V in memory
                low_rank[name] = LowRank((U * S)[:, :rank].contiguous(), V[:rank].contiguous())
        return replace(self, low_rank=low_rank, dense={})

    def require_finite(self) -> None:
        """Raise `ArtifactError` naming every module whose edit is NaN or infinite."""
        bad = [n for n, e in self.low_rank.items() if not bool(e.B.isfinite().all() and e.A.isfinite().all())]
        bad += [n for n, change in (*self.bias.items(), *self.dense.items()) if not bool(change.isfinite().all())]
        if bad:
            raise ArtifactError(f"the compiled weights of {', '.join(bad)} are not finite; nothing was written.")


def _sums(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: mine[name] + theirs[name] for name in mine.keys() & theirs.keys()}
    return {**mine, **theirs, **both}


@contextmanager
def with_patch(model: nn.Module, patch: WeightPatch) -> Iterator[None]:
    """Run `model` with `patch` added to its modules' outputs inside the block; the weights are not touched."""
    layout = Layout.of(model)
    modules = dict(layout.model.named_modules())
    with ExitStack() as stack:
        for name, edit in patch.low_rank.items():
            is_table = isinstance(modules[name], nn.Embedding)
            hook: Any = partial(_add_rows, edit.B, edit.A) if is_table else partial(_add_low_rank, edit)
            stack.callback(modules[name].register_forward_hook(hook, with_kwargs=is_table).remove)
        for name, bias in patch.bias.items():
            # Where the name is a parameter's (a mixture of experts), the whole mixture's output is shifted.
            module = modules[name] if name in modules else modules[name.rpartition(".")[0]]
            stack.callback(module.register_forward_hook(partial(_add_bias, bias)).remove)
        for name, delta in patch.dense.items():
            is_table = isinstance(modules[name], nn.Embedding)
            hook = partial(_add_rows, delta, None) if is_table else partial(_add_dense, delta)
            stack.callback(modules[name].register_forward_hook(hook, with_kwargs=is_table).remove)
        yield


def _add_rows(
    rows: Tensor, A: Tensor | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """What the embedding gives for a table of these rows (times A): [tokens, d_model], or [tokens, r] and [r, d_model]."""
    # By the embedding's own code, which may scale rows or look up other ones than its input says.
    other = copy(module)
    other._parameters = {"weight": nn.Parameter(rows.to(output), requires_grad=False)}
    change: Tensor = other.forward(*args, **kwargs)
    return output + (change if A is None else change @ A.to(output))


def _add_low_rank(edit: LowRank, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    # A x first: r numbers a token; B A would be a whole matrix.
    return output + (x @ edit.A.to(x).T) @ edit.B.to(x).T


def _add_bias(bias: Tensor, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + bias.to(output)


def _add_dense(delta: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + args[0] @ transpose_conv1d(module, delta.to(output)).T
