"""Compiled against steered on prompts of several kinds, both as they are read and as they are answered freely.

Read: KL on the steered model's own sampled continuations. Answered: how far each model's own answer is the steered
one's, since an error that is small at every token may still lead elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal

import numpy as np

from compile_steer.behaviour import Behaviour
from compile_steer.errors import RecipeError
from compile_steer.generate import continue_encoded, response_text
from compile_steer.metrics import Divergence, divergence
from compile_steer.models import Loaded
from compile_steer.observe import States, final_states
from compile_steer.program import Program
from compile_steer.scoring import repetition
from compile_steer.settings import Verify
from compile_steer.tokens import Encoded, Text, encode

Kind = Literal["held-out", "off-topic", "multi-turn", "long"]
Decoding = Literal["greedy", "sampled"]
_TEMPERATURES: dict[Decoding, float] = {"greedy": 0.0, "sampled": 1.0}


@dataclass(frozen=True)
class Free:
    """Answers given freely: `same` is the mean share of the steered answer's tokens before the first that differs,
    under compiled and under base; repetition is the mean share of repeated 3-grams. Sampled ones share their seed."""

    same: float
    same_base: float
    repetition: float
    repetition_steered: float


@dataclass(frozen=True)
class OnKind:
    """One kind of prompt: KL(steered||compiled) in nats a token on `n_tokens` response tokens of `n_texts` texts, its
    share of KL(steered||base) (None where that is 0), top-1 agreement; `prompt_tokens` is the longest prompt's length."""

    kind: Kind
    n_texts: int
    n_tokens: int
    prompt_tokens: int
    kl: float
    share: float | None
    top1: float
    greedy: Free
    sampled: Free

    def __str__(self) -> str:
        share = "" if self.share is None else f" ({self.share:.2%})"
        return f"{self.greedy.same:.0%}, {self.sampled.same:.0%}{share}"


Answered = dict[Decoding, list[list[Encoded]]]  # by decoding, the answers to each kind's prompts


def prompts_of(base: Loaded, behaviour: Behaviour, options: Verify) -> tuple[dict[Kind, list[Encoded]], list[str]]:
    """The prompts of each kind, and why a kind has none. The recipe's own conversations come before built ones."""
    count, remarks = options.kinds, []
    found: dict[Kind, list[Encoded]] = {
        "held-out": [encode(base.tokenizer, text) for text in behaviour.heldout[:count]],
        "off-topic": [encode(base.tokenizer, replace(text, response="")) for text in behaviour.neutral[:count]],
    }
    try:
        found["multi-turn"] = [encode(base.tokenizer, text) for text in islice(_conversations(behaviour), count)]
    except RecipeError as error:
        remarks.append(f"no prompts of several turns were judged ({error})")
    if options.long:
        found["long"] = [_long(base, behaviour, options.long_tokens, number) for number in range(options.long)]
        room = getattr(base.model.config, "max_position_embeddings", None)
        longest = max(len(one.ids) for one in found["long"]) + options.free_tokens
        if room is not None and longest > room:
            del found["long"]
            remarks.append(
                f"no long prompts were judged: {longest:,} tokens are needed, the model has {room:,} positions"
            )
    return found, remarks


def _conversations(behaviour: Behaviour) -> Iterator[Text]:
    """Held-out prompts that have a history, then others after a neutral exchange."""
    yield from (text for text in behaviour.heldout if text.history)
    for text, before in zip(behaviour.heldout, cycle(behaviour.neutral)):
        if not text.history:
            yield replace(text, history=((before.prompt, before.response),))


def _long(base: Loaded, behaviour: Behaviour, tokens: int, number: int) -> Encoded:
    """A held-out prompt after neutral exchanges as plain text, in one turn of at least so many tokens."""
    last = behaviour.heldout[number % len(behaviour.heldout)]
    paragraphs: list[str] = []
    for text in islice(cycle(behaviour.neutral), number, None):
        paragraphs.append(f"{text.prompt}\n{text.response}")
        encoded = encode(base.tokenizer, Text("\n\n".join([*paragraphs, last.prompt])))
        if len(encoded.ids) >= tokens:
            return encoded
    raise RecipeError("data.neutral is empty; needed: texts, from which long prompts are made.")


class Kinds:
    """Base and steered model on prompts of every kind, run once; `remarks` say which kinds are missing and why."""

    def __init__(self, base: Loaded, program: Program, behaviour: Behaviour, options: Verify, seed: int) -> None:
        self._base, self._tokens, self._seed = base, options.free_tokens, seed
        self.prompts, self.remarks = prompts_of(base, behaviour, options)
        self._steered = self._answers(base, program)
        self._plain = self._answers(base, None)
        self._states = [final_states(base, texts, program) for texts in self._steered["sampled"]]
        self._base_divergences = self._divergences(base)

    def measure(self, artifact: Loaded) -> list[OnKind]:
        """The same of an artifact, in the order of `prompts`."""
        found, answered = self._divergences(artifact), self._answers(artifact, None)
        return [
            OnKind(
                kind=kind,
                n_texts=len(prompts),
                n_tokens=len(found[at].kl),
                prompt_tokens=max(len(one.ids) for one in prompts),
                kl=found[at].mean,
                share=found[at].mean / changed if (changed := self._base_divergences[at].mean) else None,
                top1=found[at].top1_agreement,
                greedy=self._free(artifact, answered, "greedy", at),
                sampled=self._free(artifact, answered, "sampled", at),
            )
            for at, (kind, prompts) in enumerate(self.prompts.items())
        ]

    def _answers(self, loaded: Loaded, program: Program | None) -> Answered:
        return {decoding: list(self._decoded(loaded, program, decoding)) for decoding in _TEMPERATURES}

    def _decoded(self, loaded: Loaded, program: Program | None, decoding: Decoding) -> Iterator[list[Encoded]]:
        # Short prompts share a batch; beside a long one they would be padded to its length.
        short = [one for kind, prompts in self.prompts.items() if kind != "long" for one in prompts]
        answers = iter(self._continue(loaded, program, short, decoding))
        for kind, prompts in self.prompts.items():
            if kind == "long":
                yield self._continue(loaded, program, prompts, decoding)
            else:
                yield list(islice(answers, len(prompts)))

    def _continue(
        self, loaded: Loaded, program: Program | None, prompts: Sequence[Encoded], decoding: Decoding
    ) -> list[Encoded]:
        # One seed and one shape of the batch: every model draws with the same random numbers.
        return continue_encoded(
            loaded,
            prompts,
            program,
            max_new_tokens=self._tokens,
            temperature=_TEMPERATURES[decoding],
            seed=self._seed,
        )

    def _divergences(self, other: Loaded) -> list[Divergence]:
        """KL(steered||other) on the steered model's sampled answers of each kind."""
        states: list[States] = [final_states(other, texts) for texts in self._steered["sampled"]]
        return [
            divergence(self._base.model, wanted.response, other.model, got.response)
            for wanted, got in zip(self._states, states, strict=True)
        ]

    def _free(self, artifact: Loaded, answered: Answered, decoding: Decoding, at: int) -> Free:
        wanted = self._steered[decoding][at]
        return Free(
            same=_same(wanted, answered[decoding][at]),
            same_base=_same(wanted, self._plain[decoding][at]),
            repetition=_repetition(artifact, answered[decoding][at]),
            repetition_steered=_repetition(self._base, wanted),
        )


def _same(wanted: Sequence[Encoded], found: Sequence[Encoded]) -> float:
    """Mean share of each wanted answer's tokens that come before the first one that is another in `found`."""
    shares = []
    for one, other in zip(wanted, found, strict=True):
        want, got = one.ids[one.n_prompt :], other.ids[other.n_prompt :]
        first = next((at for at, token in enumerate(want) if at >= len(got) or got[at] != token), len(want))
        shares.append(first / len(want))
    return float(np.mean(shares))


def _repetition(loaded: Loaded, answers: Sequence[Encoded]) -> float:
    return float(np.mean([repetition(response_text(loaded, one)) for one in answers]))
