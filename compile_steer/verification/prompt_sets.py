"""Compiled against steered on several sets of prompts, both on given texts and when each model writes by itself.

Given texts: KL on the steered model's sampled answers. Written: how much of the steered answer the other model repeats,
since an error that is small at every token may still lead elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, cycle, islice
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.data.wordings import worded
from compile_steer.models.generate import continue_prompts, ended, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import compare_models, final_states
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded, encode, require_room
from compile_steer.scoring.base import Reply, Score
from compile_steer.scoring.text import repetition
from compile_steer.steering.program import Program
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.prompt_report import FreeAnswers, PromptKL, PromptSet, PromptSetName

PartName = TypeVar("PartName", bound=str)
Decoding = Literal["greedy", "sampled"]
_TEMPERATURES: dict[Decoding, float] = {"greedy": 0.0, "sampled": 1.0}


@dataclass(frozen=True)
class Prompt:
    """A prompt as tokens, and the plain prompt of its last turn, which a score is about."""

    plain: str
    encoded: Encoded


def build_prompts(
    base: LoadedModel, data: Behaviour, options: VerifyOptions
) -> tuple[dict[PromptSetName, list[Prompt]], list[str]]:
    """The prompts of each set, and why a set is missing."""
    count, remarks = options.prompts_per_set, []  # a set that a model cannot have is a remark, not an error

    def prompts(texts: Sequence[Text]) -> list[Prompt]:
        return [Prompt(text.prompt, encode(base.tokenizer, replace(text, response=""))) for text in texts[:count]]

    sets: dict[PromptSetName, list[Prompt]] = {"held-out": prompts(data.heldout), "off-topic": prompts(data.neutral)}
    try:
        talks = prompts(list(islice(_conversations(data), count)))
        require_room(base, [prompt.encoded for prompt in talks], options.max_new_tokens)
        sets["multi-turn"] = talks
    except RecipeError as error:
        remarks.append(f"no prompts of several turns were verified ({error})")
    return sets, remarks


def _conversations(data: Behaviour) -> Iterator[Text]:
    """Held-out prompts that have a history, then others after an exchange from the control text."""
    yield from (text for text in data.heldout if text.history)
    for text, before in zip(data.heldout, cycle(data.neutral)):
        if not text.history:
            yield replace(text, history=((before.prompt, before.response),))


@dataclass(frozen=True)
class _Run:
    """One model on all prompts, set after set."""

    model: LoadedModel
    answers: dict[Decoding, list[Encoded]]  # its own
    states: dict[PromptSetName, Tensor]  # final states [n, d_model] that predict the steered model's sampled answers
    scores: dict[Decoding, np.ndarray]  # of its own answers, [n_prompts]; empty where they cannot be scored


class PromptSets:
    """Base and steered model on every prompt set, run once; `remarks` say which sets are missing and why.

    `score` is None where it cannot be asked about a prompt that is not in the data.
    """

    def __init__(
        self,
        base: LoadedModel,
        program: Program,
        data: Behaviour,
        options: VerifyOptions,
        seed: int,
        score: Score | None,
    ) -> None:
        self._tokens, self._seed, self._score = options.free_tokens, seed, score
        sets, self.remarks = build_prompts(base, data, options)
        self.prompts = {name: [prompt.encoded for prompt in prompts] for name, prompts in sets.items()}
        self._plain = [prompt.plain for prompts in sets.values() for prompt in prompts]
        ends = list(accumulate(map(len, sets.values())))
        self._parts = {name: slice(end - len(sets[name]), end) for name, end in zip(sets, ends, strict=True)}
        texts = [replace(text, response="") for text in data.heldout[: options.prompts_per_set]]
        by_name, missing = worded(base, texts, data.neutral, self._tokens)
        self.remarks += missing
        every = [prompt for prompts in by_name.values() for prompt in prompts]
        written = iter(
            continue_prompts(base, every, program, max_new_tokens=self._tokens, temperature=1.0, seed=seed)
            if every
            else ()
        )
        self._worded = {name: list(islice(written, len(prompts))) for name, prompts in by_name.items()}
        self._steered = self._run(base, program)
        self._base = self._run(base, None)
        self._kl_base = {
            name: self._kl_to_base(states, self._base.states[name]) for name, states in self._steered.states.items()
        }
        # Of each wording: the steered model's final states, and its mean KL to the base.
        self._worded_states = dict[str, tuple[Tensor, float]]()
        steered, unsteered = (_states_by_part(base, self._worded, setting) for setting in (program, None))
        for name, states in steered.items():
            self._worded_states[name] = states, self._kl_to_base(states, unsteered[name])

    def _kl_to_base(self, steered: Tensor, unsteered: Tensor) -> float:
        return compare_models(self._base.model, steered, self._base.model, unsteered).mean

    def compare(self, artifact: LoadedModel) -> list[PromptSet]:
        """The artifact on every set."""
        return self._compared(self._run(artifact, None))

    def of_steered(self) -> list[PromptSet]:
        """The steered model itself on every set."""
        return self._compared(self._steered)

    def compare_wordings(self, artifact: LoadedModel | None) -> list[PromptKL]:
        """The artifact, None for the steered model itself, on held-out prompts in every wording."""
        base, results = self._steered.model, []
        own = None if artifact is None else _states_by_part(artifact, self._worded)
        for name, answers in self._worded.items():
            steered, kl_base = self._worded_states[name]
            kl = compare_models(base, steered, artifact or base, steered if own is None else own[name])
            remaining, longest = kl.mean / kl_base if kl_base else None, max(text.n_prompt for text in answers)
            results.append(PromptKL(name, len(answers), len(kl.kl), longest, kl.mean, remaining, kl.top1_agreement))
        return results

    def _compared(self, compiled: _Run) -> list[PromptSet]:
        base, steered, results = self._base, self._steered, []
        for name, part in self._parts.items():
            kl = compare_models(steered.model, steered.states[name], compiled.model, compiled.states[name])
            kl_base = self._kl_base[name]
            results.append(
                PromptSet(
                    name=name,
                    n_texts=len(self.prompts[name]),
                    n_tokens=len(kl.kl),
                    prompt_tokens=max(len(prompt.ids) for prompt in self.prompts[name]),
                    kl=kl.mean,
                    kl_remaining=kl.mean / kl_base if kl_base else None,
                    top1=kl.top1_agreement,
                    greedy=_free_answers(compiled, steered, base, "greedy", part),
                    sampled=_free_answers(compiled, steered, base, "sampled", part),
                )
            )
        return results

    def _run(self, model: LoadedModel, program: Program | None) -> _Run:
        """Answer every prompt, and read the steered model's sampled answers; the steered model comes first."""

        prompts = [prompt for of_set in self.prompts.values() for prompt in of_set]
        # One batch, of one shape, and one seed: every model draws with the same random numbers.
        every = [prompt for _decoding in _TEMPERATURES for prompt in prompts]
        each = [temperature for temperature in _TEMPERATURES.values() for _prompt in prompts]
        written = iter(
            continue_prompts(model, every, program, max_new_tokens=self._tokens, temperature=each, seed=self._seed)
        )
        answers = {decoding: list(islice(written, len(prompts))) for decoding in _TEMPERATURES}
        # Sampled answers are read, because greedy ones are where a model is most certain.
        texts = (self._steered.answers if program is None else answers)["sampled"]
        states = _states_by_part(model, {name: texts[part] for name, part in self._parts.items()}, program)
        scores = {}
        if self._score is not None:
            for decoding, own in answers.items():
                replies = zip(self._plain, own, strict=True)
                scores[decoding] = self._score(
                    [Reply(plain, response_text(model, text), ended(model, text)) for plain, text in replies]
                )
        return _Run(model, answers, states, scores)


def _states_by_part(
    model: LoadedModel, parts: Mapping[PartName, Sequence[Encoded]], program: Program | None = None
) -> dict[PartName, Tensor]:
    """Final states [n, d_model] that predict the responses of each part's texts; all are read together."""
    if not parts:
        return {}
    states = final_states(model, [text for texts in parts.values() for text in texts], program)
    own, start = dict[PartName, Tensor](), 0
    for name, texts in parts.items():
        own[name] = states.of_texts(start, start + len(texts))
        start += len(texts)
    return own


def _free_answers(compiled: _Run, steered: _Run, base: _Run, decoding: Decoding, part: slice) -> FreeAnswers:
    runs = (compiled, steered, base)
    own, expected, unsteered = (run.answers[decoding][part] for run in runs)
    score, score_steered, score_base = (
        float(run.scores[decoding][part].mean()) if run.scores else None for run in runs
    )
    repeated, repeated_steered = (
        float(np.mean([repetition(response_text(run.model, text)) for text in run.answers[decoding][part]]))
        for run in runs[:2]
    )
    return FreeAnswers(
        same=same_until(expected, own),
        same_base=same_until(expected, unsteered),
        repetition=repeated,
        repetition_steered=repeated_steered,
        score=score,
        score_steered=score_steered,
        score_base=score_base,
    )


def same_until(expected: Sequence[Encoded], answers: Sequence[Encoded]) -> float:
    """Mean fraction of each expected answer's tokens before the first that differs in `answers`."""
    fractions = []
    for want, got in zip(expected, answers, strict=True):
        tokens, others = want.ids[want.n_prompt :], got.ids[got.n_prompt :]
        first = next((at for at, token in enumerate(tokens) if at >= len(others) or others[at] != token), len(tokens))
        fractions.append(first / len(tokens))
    return float(np.mean(fractions))
