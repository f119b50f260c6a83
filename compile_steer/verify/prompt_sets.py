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
import torch
from torch import Tensor
from transformers import Cache

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.generate import continue_encoded, ended, prefill, response_text, states_after
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import TokenDivergence, divergence, final_states
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.text import repetition
from compile_steer.steering.program import Program
from compile_steer.verify.options import Verify

Kind = Literal["held-out", "off-topic", "multi-turn", "long"]
Decoding = Literal["greedy", "sampled"]
_TEMPERATURES: dict[Decoding, float] = {"greedy": 0.0, "sampled": 1.0}


@dataclass(frozen=True)
class Free:
    """Answers given freely: `same` is the mean share of the steered answer's tokens before the first that differs,
    under compiled and under base; repetition is the mean share of repeated 3-grams. Sampled ones share their seed.
    `score*` are mean scores of the behaviour, compiled, steered and base; None where the scorer knows the data's prompts alone."""

    same: float
    same_base: float
    repetition: float
    repetition_steered: float
    score: float | None = None
    score_steered: float | None = None
    score_base: float | None = None


@dataclass(frozen=True)
class OnKind:
    """One kind of prompt: KL(steered||compiled) in nats a token on `n_tokens` response tokens of `n_texts` texts, those of
    earlier turns too; its share of KL(steered||base) (None where that is 0), top-1 agreement; `prompt_tokens` is the
    longest prompt's length."""

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


Answered = dict[Decoding, list[Encoded]]  # by decoding, the answers to all prompts, kind after kind; long ones last


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, and the plain prompt of its last turn, which a score is about."""

    plain: str
    encoded: Encoded


def prompts_of(base: LoadedModel, behaviour: Behaviour, options: Verify) -> tuple[dict[Kind, list[Asked]], list[str]]:
    """The prompts of each kind, and why a kind has none. The recipe's own conversations come before built ones."""
    count, remarks = options.kinds, []

    def asked(text: Text) -> Asked:
        return Asked(text.prompt, encode(base.tokenizer, replace(text, response="")))

    found: dict[Kind, list[Asked]] = {
        "held-out": [asked(text) for text in behaviour.heldout[:count]],
        "off-topic": [asked(text) for text in behaviour.neutral[:count]],
    }
    try:
        found["multi-turn"] = [asked(text) for text in islice(_conversations(behaviour), count)]
    except RecipeError as error:
        remarks.append(f"no prompts of several turns were judged ({error})")
    if options.long:
        found["long"] = [_long(base, behaviour, options.long_tokens, number) for number in range(options.long)]
        room = getattr(base.model.config, "max_position_embeddings", None)
        longest = max(len(one.encoded.ids) for one in found["long"]) + options.free_tokens
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


def _long(base: LoadedModel, behaviour: Behaviour, tokens: int, number: int) -> Asked:
    """A held-out prompt after neutral exchanges as plain text, in one turn of at least so many tokens."""
    last = behaviour.heldout[number % len(behaviour.heldout)]
    paragraphs: list[str] = []
    for text in islice(cycle(behaviour.neutral), number, None):
        paragraphs.append(f"{text.prompt}\n{text.response}")
        whole = Text("\n\n".join([*paragraphs, last.prompt]))
        encoded = encode(base.tokenizer, whole)
        if len(encoded.ids) >= tokens:
            return Asked(whole.prompt, encoded)
    raise RecipeError("data.neutral is empty; needed: texts, from which long prompts are made.")


@dataclass(frozen=True)
class _Seen:
    """A model on every kind: its free answers, the final states [n, d_model] that predict the steered sampled ones, and
    the scores of its own by decoding, [n_prompts]; none where they cannot be scored."""

    answers: Answered
    states: list[Tensor]
    scores: dict[Decoding, np.ndarray]


class Kinds:
    """Base and steered model on prompts of every kind, run once; `remarks` say which kinds are missing and why.

    `score` is None where it cannot be asked about a prompt that is not in the data.
    """

    def __init__(
        self, base: LoadedModel, program: Program, behaviour: Behaviour, options: Verify, seed: int, score: Score | None
    ) -> None:
        self._base, self._tokens, self._seed, self._score = base, options.free_tokens, seed, score
        asked, self.remarks = prompts_of(base, behaviour, options)
        self.prompts = {kind: [one.encoded for one in some] for kind, some in asked.items()}
        self._asked = [one.plain for some in asked.values() for one in some]
        self._steered = self._see(base, program, None)
        self._plain = self._see(base, None, self._steered.answers)
        self._base_divergences = self._divergences(base, self._plain)

    @property
    def base_scores(self) -> np.ndarray | None:
        """[n_prompts], the mean over ways of decoding; None where they cannot be scored."""
        return _scores(self._plain)

    @property
    def steered_scores(self) -> np.ndarray | None:
        """The same under the program's hooks."""
        return _scores(self._steered)

    def measure(self, artifact: LoadedModel) -> tuple[list[OnKind], np.ndarray | None]:
        """The same of an artifact, in the order of `prompts`, and its own scores as `base_scores`."""
        seen = self._see(artifact, None, self._steered.answers)
        return self._by_kind(artifact, seen), _scores(seen)

    def _by_kind(self, artifact: LoadedModel, seen: _Seen) -> list[OnKind]:
        found = self._divergences(artifact, seen)
        return [
            OnKind(
                kind=kind,
                n_texts=len(prompts),
                n_tokens=len(found[at].kl),
                prompt_tokens=max(len(one.ids) for one in prompts),
                kl=found[at].mean,
                share=found[at].mean / changed if (changed := self._base_divergences[at].mean) else None,
                top1=found[at].top1_agreement,
                greedy=self._free(artifact, seen, "greedy", at),
                sampled=self._free(artifact, seen, "sampled", at),
            )
            for at, (kind, prompts) in enumerate(self.prompts.items())
        ]

    def _see(self, loaded: LoadedModel, program: Program | None, wanted: Answered | None) -> _Seen:
        """Answer every prompt, and read the `wanted` answers, by default the model's own."""
        short = [one for kind, prompts in self.prompts.items() if kind != "long" for one in prompts]
        own: Answered = {how: self._continue(loaded, program, short, how) for how in _TEMPERATURES}
        # A prompt of a thousand tokens is read once, and then gone on from three times.
        caches = [prefill(loaded, one, program) for one in self.prompts.get("long", [])]
        for prompt, cache in zip(self.prompts.get("long", []), caches, strict=True):
            for how, answers in own.items():
                answers += self._continue(loaded, program, [prompt], how, cache)
        read = (wanted or own)["sampled"]
        states, start = [], 0
        for kind, prompts in self.prompts.items():
            texts = read[start : (start := start + len(prompts))]
            if kind == "long":
                after = zip(texts, caches, strict=True)
                states.append(torch.cat([states_after(loaded, text, cache, program) for text, cache in after]))
            else:
                states.append(final_states(loaded, texts, program).response)
        return _Seen(own, states, self._scored(loaded, own))

    def _scored(self, loaded: LoadedModel, own: Answered) -> dict[Decoding, np.ndarray]:
        """[n_prompts] by decoding."""
        if self._score is None:
            return {}
        found: dict[Decoding, np.ndarray] = {}
        for how, answers in own.items():
            said = zip(self._asked, answers, strict=True)
            found[how] = self._score(
                [Reply(plain, response_text(loaded, one), ended(loaded, one)) for plain, one in said]
            )
        return found

    def _continue(
        self,
        loaded: LoadedModel,
        program: Program | None,
        prompts: Sequence[Encoded],
        how: Decoding,
        cache: Cache | None = None,
    ) -> list[Encoded]:
        # One seed and one shape of the batch: every model draws with the same random numbers.
        return continue_encoded(
            loaded,
            prompts,
            program,
            max_new_tokens=self._tokens,
            temperature=_TEMPERATURES[how],
            seed=self._seed,
            cache=cache,
        )

    def _divergences(self, other: LoadedModel, seen: _Seen) -> list[TokenDivergence]:
        """KL(steered||other) on the steered model's sampled answers of each kind."""
        return [
            divergence(self._base.model, wanted, other.model, got)
            for wanted, got in zip(self._steered.states, seen.states, strict=True)
        ]

    def _of(self, at: int) -> slice:
        """Where the prompts of the kind with this number are."""
        counts = [len(prompts) for prompts in self.prompts.values()]
        return slice(sum(counts[:at]), sum(counts[: at + 1]))

    def _free(self, artifact: LoadedModel, seen: _Seen, how: Decoding, at: int) -> Free:
        part = self._of(at)
        got, wanted, plain = (one.answers[how][part] for one in (seen, self._steered, self._plain))
        compiled, steered, base = (
            float(one.scores[how][part].mean()) if one.scores else None for one in (seen, self._steered, self._plain)
        )
        return Free(
            same=_same(wanted, got),
            same_base=_same(wanted, plain),
            repetition=_repetition(artifact, got),
            repetition_steered=_repetition(self._base, wanted),
            score=compiled,
            score_steered=steered,
            score_base=base,
        )


def _scores(seen: _Seen) -> np.ndarray | None:
    return np.mean(list(seen.scores.values()), axis=0) if seen.scores else None


def _same(wanted: Sequence[Encoded], found: Sequence[Encoded]) -> float:
    """Mean share of each wanted answer's tokens that come before the first one that is another in `found`."""
    shares = []
    for one, other in zip(wanted, found, strict=True):
        want, got = one.ids[one.n_prompt :], other.ids[other.n_prompt :]
        first = next((at for at, token in enumerate(want) if at >= len(got) or got[at] != token), len(want))
        shares.append(first / len(want))
    return float(np.mean(shares))


def _repetition(loaded: LoadedModel, answers: Sequence[Encoded]) -> float:
    return float(np.mean([repetition(response_text(loaded, one)) for one in answers]))
