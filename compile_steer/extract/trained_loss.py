"""What vectors are trained on: losses of a batch of responses under a program, over blocks whose prefix is kept.

    likelihood  - log p(r_T | q, v), a token
    bipo        - log sigmoid(d b [log p(r_T | q, d v) / p(r_T | q) - log p(r_O | q, d v) / p(r_O | q)])

with q a prompt, r_T and r_O its positive and negative response, p(. | q, v) the model steered by v, b the `beta` of
the recipe and d a sign drawn anew for every step: the vectors are to raise the preference when they are added and to
turn it round when they are subtracted (Cao et al. 2406.00045, equation 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from compile_steer.models.forward import run_blocks
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import response_logprobs
from compile_steer.models.text import Pair, Text
from compile_steer.models.tokens import Batch, Encoded, batches, encode, pad
from compile_steer.steering.hooks import steered
from compile_steer.steering.program import Program


@dataclass(frozen=True)
class Item:
    """One batch; `prefix` [batch, time, d_model] is the input of the first trained block.

    `reference` [batch] are the base's log p(response). Of a preference the rows are the positives of some pairs, then
    their negatives.
    """

    batch: Batch
    prefix: Tensor | None
    reference: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss of the recipe, on a model that is run from block `first` on."""

    loaded: LoadedModel
    kind: Literal["likelihood", "bipo"]
    beta: float
    first: int

    def items(self, pairs: Sequence[Pair], max_tokens: int) -> list[Item]:
        """The pairs in batches of at most `max_tokens` padded tokens, each with what the base gives for it."""
        positives = [_closed(self.loaded, p.prompt, p.positive.response) for p in pairs]
        if self.kind == "likelihood":
            return [self._item(batch) for batch in batches(self.loaded, positives, max_tokens=max_tokens)]
        texts = positives + [_closed(self.loaded, p.prompt, p.negative.response) for p in pairs]
        longest = [max(texts[n], texts[n + len(pairs)], key=lambda one: len(one.ids)) for n in range(len(pairs))]
        groups = [batch.rows for batch in batches(self.loaded, longest, max_tokens=max_tokens // 2)]
        return [
            self._item(pad(texts, [*rows, *(row + len(pairs) for row in rows)], self.loaded.pad_id)) for rows in groups
        ]

    def _item(self, batch: Batch) -> Item:
        batch, model = batch.to(self.loaded.device), self.loaded.model
        with torch.no_grad():
            prefix = run_blocks(model, batch.input_ids, batch.attention_mask, stop=self.first) if self.first else None
            item = Item(batch, prefix, torch.zeros(len(batch.rows), device=self.loaded.device))
            if self.kind == "likelihood":
                return item  # needs no base
            return replace(item, reference=self._log_probabilities(item, None))

    def count(self, item: Item) -> int:
        """What the mean of an item's loss is over: response tokens, or pairs."""
        return int(item.batch.predicts_response.sum()) if self.kind == "likelihood" else len(item.batch.rows) // 2

    def loss(self, item: Item, program: Program, sign: float) -> Tensor:
        """The item's mean loss under `sign` times `program`, in nats; a likelihood knows no other sign than 1."""
        found = self._log_probabilities(item, program if sign == 1 else program.scaled(sign))
        if self.kind == "likelihood":
            return -found.sum() / self.count(item)
        return bipo_loss(found, item.reference, self.beta, sign)

    @property
    def signs(self) -> tuple[float, ...]:
        """The signs that a step draws from, and that a measurement is the mean over."""
        return (1.0,) if self.kind == "likelihood" else (1.0, -1.0)

    def measure(self, items: Sequence[Item], program: Program) -> float:
        """The mean loss over all items and signs."""
        total = count = 0.0
        with torch.no_grad():
            for item in items:
                n = self.count(item)
                total += n * sum(float(self.loss(item, program, sign)) for sign in self.signs) / len(self.signs)
                count += n
        return total / count

    def _log_probabilities(self, item: Item, program: Program | None) -> Tensor:
        """[batch] log p(response) in nats, under `program` or the base's; differentiable."""
        batch, model = item.batch, self.loaded.model
        under = program or Program((), self.loaded.id, self.loaded.revision)
        with steered(model, under, roles=batch.roles):
            hidden = run_blocks(model, batch.input_ids, batch.attention_mask, start=self.first, hidden=item.prefix)
        return response_logprobs(model, batch, hidden)


def bipo_loss(log_probabilities: Tensor, reference: Tensor, beta: float, sign: float) -> Tensor:
    """The mean of the paper's loss over n pairs, from [2 n] log p(response) steered and not, the positives first."""
    positive, negative = (log_probabilities - reference).chunk(2)
    return nn.functional.softplus(-sign * beta * (positive - negative)).mean()


def _closed(loaded: LoadedModel, prompt: str, response: str) -> Encoded:
    """The response to the plain prompt, and the token that ends the turn."""
    one, end = encode(loaded.tokenizer, Text(prompt, response)), loaded.tokenizer.eos_token_id
    return one if end is None else replace(one, ids=(*one.ids, int(end)))
