"""The base stored in fewer bits, as a form stores its weights: what that costs by itself, told apart from the compile.

Two references answer two questions. Against the steered model in full precision a quantised artifact shows all that its
user gets, the quantisation's cost with the compile's. Against the hooks on the base quantised the same way it shows the
compile alone: every matrix that the compile left alone is then the same on both sides, bit for bit. What is left of the
quantisation there is that an edited matrix is rounded anew, which is measured too, as what rounding these alone costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from compile_steer.models.gguf import gguf_in, stored_types
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, TokenDivergence, divergence, final_states, logprob_margins
from compile_steer.models.reload import fresh_copy
from compile_steer.models.tokens import Encoded
from compile_steer.steering.program import Program
from compile_steer.verify.capability import answered

_CASTS = {"merged-bf16": torch.bfloat16, "merged-fp16": torch.float16}
Rounding = Callable[[str, Tensor], Tensor]  # a parameter's name and values -> the values as they are stored


def rounding_of(form: str, folder: Path, base: LoadedModel) -> tuple[object, Rounding] | None:
    """How `folder`, of that form, stores the base's weights, with what tells it from other ways; None for all bits.

    Of a GGUF file it is read off the file itself, tensor by tensor.
    """
    if form in _CASTS:
        dtype = _CASTS[form]
        return dtype, lambda _name, values: values.to(dtype)
    file = gguf_in(folder)
    if file is None:
        return None
    kinds = stored_types(file, base.model)

    def quantised(name: str, values: Tensor) -> Tensor:
        kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
        stored = gguf.quantize(values.float().cpu().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(stored, kind).reshape(tuple(values.shape)))

    return frozenset(kinds.items()), quantised


class Rounded:
    """Base and steered model as the judge's `Reference` has them, with the base's weights rounded."""

    def __init__(
        self,
        base: LoadedModel,
        program: Program,
        heldout: Sequence[Encoded],
        neutral: Sequence[Encoded],
        pairs: Sequence[Encoded],
        questions: int,
        whole: tuple[FinalStates, FinalStates],
        rounding: Rounding,
    ) -> None:
        """`whole`: the states of base and steered model on `heldout` in full precision."""
        self._base, self._program, self._heldout, self._neutral, self._pairs = base, program, heldout, neutral, pairs
        self._questions = questions
        self._whole_base, self._whole_steered = whole
        self.loaded = fresh_copy(base)
        with torch.no_grad():
            for name, parameter in self.loaded.model.named_parameters():
                parameter.copy_(rounding(name, parameter))
        self.base_heldout, self.steered_heldout = (final_states(self.loaded, heldout, p) for p in (None, program))

    @cached_property
    def kl_base(self) -> float:
        """Mean KL(base || rounded base) on the held-out texts, nats a token."""
        return divergence(
            self._base.model, self._whole_base.response, self.loaded.model, self.base_heldout.response
        ).mean

    @cached_property
    def noise(self) -> TokenDivergence:
        """KL(steered || steered, on the rounded base): what the rounding costs by itself."""
        return divergence(
            self._base.model, self._whole_steered.response, self.loaded.model, self.steered_heldout.response
        )

    @cached_property
    def changed(self) -> float:
        """Mean KL(steered, on the rounded base || rounded base), nats a token."""
        return self.from_steered(self.loaded, self.base_heldout).mean

    @cached_property
    def base_contrast(self) -> np.ndarray:
        """[n_pairs], nats a token."""
        return logprob_margins(self.loaded, self._pairs)

    @cached_property
    def steered_contrast(self) -> np.ndarray:
        """[n_pairs], nats a token."""
        return logprob_margins(self.loaded, self._pairs, self._program)

    @cached_property
    def base_neutral(self) -> FinalStates:
        return final_states(self.loaded, self._neutral)

    @cached_property
    def neutral_drift(self) -> float:
        """Mean KL(rounded base || steered, on it) over the neutral responses, nats a token."""
        return self.drift(self.loaded, final_states(self.loaded, self._neutral, self._program))

    @cached_property
    def base_able(self) -> np.ndarray:
        """[questions], 1 or 0."""
        return answered(self.loaded, self._questions)

    @cached_property
    def steered_able(self) -> np.ndarray:
        """[questions], 1 or 0."""
        return answered(self.loaded, self._questions, self._program)

    def from_steered(self, other: LoadedModel, states: FinalStates) -> TokenDivergence:
        """KL(steered, on the rounded base || other) at the positions that predict the held-out responses."""
        return divergence(self.loaded.model, self.steered_heldout.response, other.model, states.response)

    def drift(self, other: LoadedModel, states: FinalStates) -> float:
        """Mean KL(rounded base || other) over the neutral responses, nats a token."""
        return divergence(self.loaded.model, self.base_neutral.response, other.model, states.response).mean

    def edited(self, artifact: LoadedModel) -> list[str]:
        """The matrices of `artifact` that are not the rounded base's own, by their names."""
        own = dict(self.loaded.model.named_parameters(remove_duplicate=False))
        return [
            name
            for name, value in artifact.model.named_parameters()
            if value.ndim > 1 and not (name in own and torch.equal(value, own[name]))
        ]

    def cost_of(self, edited: Sequence[str]) -> float:
        """Mean KL(steered || steered with these matrices alone rounded) on the held-out texts, nats a token."""
        if not edited:
            return 0.0
        with self._unrounded_but(edited):
            found = final_states(self.loaded, self._heldout, self._program)
            return divergence(self._base.model, self._whole_steered.response, self.loaded.model, found.response).mean

    @contextmanager
    def _unrounded_but(self, edited: Sequence[str]) -> Iterator[None]:
        whole = dict(self._base.model.named_parameters(remove_duplicate=False))
        own = dict(self.loaded.model.named_parameters(remove_duplicate=False))
        kept = {id(own[name]) for name in edited if name in own}  # a tied head is one parameter of two names
        turned = {name: one for name, one in own.items() if id(one) not in kept}
        before = {name: one.data for name, one in turned.items()}
        try:
            for name, one in turned.items():
                one.data = whole[name].data
            yield
        finally:
            for name, one in turned.items():
                one.data = before[name]
