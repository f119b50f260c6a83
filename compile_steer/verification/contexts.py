"""How much of the steering is left behind contexts of every length.

The held-out answers are read once by themselves and once in long conversations with control text before the prompts, so that
every one is measured behind a short and behind a long context, for the price of one pass over each long text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compile_steer.data.behaviour import Context
from compile_steer.data.contexts import SHORTEST, long_context
from compile_steer.models.generate import response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import FinalStates, TokenDivergence, compare_models, final_states
from compile_steer.models.tokens import Encoded
from compile_steer.stats import bootstrap_ratio
from compile_steer.steering.program import Program
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.prompt_report import ContextLength

_STEP = 4  # from one length to the next
_FIRST = 4 * SHORTEST  # tokens before which most short prompts end


class Contexts:
    """Base and steered model on long contexts of held-out answers, run once; `remarks` say why there are none."""

    def __init__(
        self, context: Context, program: Program, options: VerifyOptions, heldout: list[Encoded], states: FinalStates
    ) -> None:
        """Make the contexts.

        Args:
            heldout: the steered model's answers to held-out prompts; `states` are its final states on them.
        """
        base, data, self._seed = context.model, context.data, context.seed
        self.texts, self.remarks = list[Encoded](), list[str]()
        self._base, self._heldout = base, states
        tokens = min(options.long_tokens, base.positions or options.long_tokens)
        if options.long and tokens < _FIRST:
            self.remarks.append(
                f"no contexts of {_FIRST} tokens or more were verified: at most {tokens} are possible (verify.long_tokens "
                f"{options.long_tokens:,}; the model's positions: {base.positions or 'no limit'})"
            )
        elif options.long:
            answered = [
                replace(text, response=response_text(base, answer))
                for text, answer in zip(data.heldout, heldout, strict=False)
            ]
            control = data.neutral[: options.neutral]
            for number in range(options.long):
                self.texts.append(long_context(base, answered, control, tokens, self._seed + number))
            self._steered = final_states(base, self.texts, program)
            self._kl_base = self._kl(base, final_states(base, self.texts))

    def _kl(self, model: LoadedModel, states: FinalStates) -> TokenDivergence:
        return compare_models(self._base, self._steered.response, model, states.response)

    def compare(self, model: LoadedModel | None, kl: TokenDivergence, kl_base: TokenDivergence) -> list[ContextLength]:
        """The model by lengths of context, None for the steered model itself; `kl` and `kl_base` are on the held-out texts."""
        if not self.texts:
            return []
        parts = [self._steered, self._heldout]
        if model is None:
            long = TokenDivergence(torch.zeros_like(self._kl_base.kl), torch.ones_like(self._kl_base.same_top1))
        else:
            long = self._kl(model, final_states(model, self.texts))
        # Answers of one response share a topic, so the response is the unit.
        owners = torch.cat([part.texts * len(part.texts) + part.turns for part in parts])
        owners[len(long.kl) :] += int(owners.max()) + 1
        before = torch.cat([part.before for part in parts])
        all_kl, all_base = torch.cat([long.kl, kl.kl]), torch.cat([self._kl_base.kl, kl_base.kl])
        return list(self._by_length(before, owners, all_kl, all_base, torch.cat([long.same_top1, kl.same_top1])))

    def _by_length(
        self, before: Tensor, owners: Tensor, kl: Tensor, kl_base: Tensor, same_top1: Tensor
    ) -> Iterator[ContextLength]:
        start, stop = 0, _FIRST
        while start <= int(before.max()):
            here = (before >= start) & (before < stop)
            if here.any() and float(kl_base[here].sum()) > 0:
                yield ContextLength(
                    start=start,
                    stop=min(stop, int(before.max()) + 1),
                    n_tokens=int(here.sum()),
                    n_responses=len(owners[here].unique()),
                    kl=float(kl[here].mean()),
                    kl_base=float(kl_base[here].mean()),
                    kl_remaining=bootstrap_ratio(kl[here], kl_base[here], owners[here], seed=self._seed),
                    top1=float(same_top1[here].double().mean()),
                )
            start, stop = stop, stop * _STEP
