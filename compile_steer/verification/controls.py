"""Controls beside the main comparison: short questions with one right answer, and what an adapter does by itself.

Multiple choice misses what steering and compiling break first: a model that still ranks the right letter first may no
longer say it, so the questions are answered freely. They are few and our own: they show damage, not ability.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from scipy.stats import binomtest
from torch import Tensor

from compile_steer.models.generate import continue_prompts, response_text
from compile_steer.models.load import LoadedModel
from compile_steer.models.logprobs import divergence, encode_pairs, final_states, logprob_margins
from compile_steer.models.reload import ADAPTER, adapter_scaled
from compile_steer.models.text import Text
from compile_steer.stats import equivalence
from compile_steer.steering.program import Program
from compile_steer.verification.parity import AdapterControls, AdapterScale, Capability

if TYPE_CHECKING:
    from compile_steer.verification.reference import Reference

# An adapter's controls have to show large differences only, for which few pairs and texts suffice.
_CONTROL_PAIRS = 8
_RANDOM_ADAPTERS = 3
_SCALES = (0.0, 0.5, 1.0, -1.0)
_SCALE_TEXTS = 4
_ANSWER_TOKENS = 12  # the longest right answer has five words
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Question:
    """A question and its right answers: one of them as whole words anywhere in the reply, in any case.

    Where the answer is one of several words, `choices`, it must be the first of them in the reply.
    """

    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def is_right(self, reply: str) -> bool:
        words = "|".join(re.escape(word) for word in self.choices or self.answers)
        first = re.search(rf"(?<!\w)({words})(?!\w)", reply, re.IGNORECASE)
        return first is not None and first[1].lower() in {answer.lower() for answer in self.answers}


# Four kinds in turn, so that the first few are of every kind: arithmetic, copying, capitals, facts.
QUESTIONS = (
    Question("What is 2 + 3? Answer with a number.", ("5", "five")),
    Question("Repeat this word and nothing else: lantern", ("lantern",)),
    Question("What is the capital of France?", ("Paris",)),
    Question("Is fire hot? Answer yes or no.", ("yes",), _YES_NO),
    Question("What is 10 - 4? Answer with a number.", ("6", "six")),
    Question("Write the word 'purple' once.", ("purple",)),
    Question("What is the capital of Japan?", ("Tokyo",)),
    Question("Do cats have wings? Answer yes or no.", ("no",), _YES_NO),
    Question("What is 3 times 4? Answer with a number.", ("12", "twelve")),
    Question("Repeat these words exactly: red green blue", ("red green blue", "red, green, blue")),
    Question("What is the capital of Italy?", ("Rome",)),
    Question("Is Monday a day of the week? Answer yes or no.", ("yes",), _YES_NO),
    Question("Which number comes next: 7, 8, 9?", ("10", "ten")),
    Question("Copy this number: 4815", ("4815", "4,815")),
    Question("What is the capital of Germany?", ("Berlin",)),
    Question("Is the sun colder than ice? Answer yes or no.", ("no",), _YES_NO),
    Question("What is half of 20? Answer with a number.", ("10", "ten")),
    Question("Say 'good morning' and nothing else.", ("good morning",)),
    Question("What is the capital of Spain?", ("Madrid",)),
    Question("Can fish swim? Answer yes or no.", ("yes",), _YES_NO),
    Question("How many days are there in one week?", ("7", "seven")),
    Question("What is the last word of this line: we sailed to Norway", ("Norway",)),
    Question("What is the capital of Egypt?", ("Cairo",)),
    Question("Is a mouse larger than an elephant? Answer yes or no.", ("no",), _YES_NO),
)


def correct_answers(model: LoadedModel, count: int, program: Program | None = None) -> np.ndarray:
    """Which of the first `count` questions are answered correctly, greedily, under `program` if given: [count], 1 or 0."""
    if not count:
        return np.zeros(0)
    questions = QUESTIONS[:count]
    prompts = [Text(question.prompt) for question in questions]
    answers = continue_prompts(model, prompts, program, max_new_tokens=_ANSWER_TOKENS)
    right = [q.is_right(response_text(model, answer)) for q, answer in zip(questions, answers, strict=True)]
    return np.array(right, dtype=float)


def capability_retention(base: np.ndarray, steered: np.ndarray, compiled: np.ndarray, margin: float) -> Capability:
    """Compare correct answers, [n] each; `margin` is the equivalence margin of their fraction.

    Raises:
        ValueError: fewer than two questions.
    """
    lost, gained = int((steered > compiled).sum()), int((steered < compiled).sum())
    # McNemar's exact test: which way the questions went that only one of the two answers correctly.
    p = float(binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0
    before, hooked, after = (float(correct.mean()) for correct in (base, steered, compiled))
    test = equivalence("capability", compiled - steered, margin)
    return Capability(len(base), before, hooked, after, lost, gained, p, test)


def adapter_controls(reference: Reference, artifact: LoadedModel, compiled: np.ndarray) -> AdapterControls:
    """What the adapter changes on the first test pairs, and what random adapters, other scales and other pairs do.

    Args:
        artifact: the base with the reloaded adapter; left as it was.
        compiled: its log-likelihood margins on all test pairs, [n_pairs].
    """
    data = reference.context.data
    pairs = encode_pairs(artifact, data.test[:_CONTROL_PAIRS])
    others = encode_pairs(artifact, data.other_behaviour[:_CONTROL_PAIRS])
    base = reference.margins.base[: len(pairs) // 2]

    def effect(scale: float = 1.0) -> float:
        with adapter_scaled(artifact, scale):
            return float((logprob_margins(artifact, pairs) - base).mean())

    elsewhere = logprob_margins(artifact, others) - logprob_margins(reference.model, others)
    random = []
    for seed in range(_RANDOM_ADAPTERS):
        with _randomised(artifact, reference.context.seed + seed):
            random.append(effect())
    return AdapterControls(
        effect=float((compiled[: len(base)] - base).mean()),
        random=random,
        negated=effect(-1.0),
        halved=effect(0.5),
        other_behaviour=float(elsewhere.mean()) if others else None,
        n_pairs=len(base),
        scales=adapter_scales(reference, artifact),
    )


def adapter_scales(reference: Reference, artifact: LoadedModel) -> list[AdapterScale]:
    """Compare the adapter at each scale with the hooks at that scale; `artifact` is left as it was."""
    # Written at scale 1, and read at every scale.
    base, texts, scales = reference.model, reference.heldout[:_SCALE_TEXTS], []
    unsteered = final_states(base, texts).response
    for scale in _SCALES:
        # Without any hook at 0, so that it is the base itself that the adapter is compared with.
        steered = final_states(base, texts, reference.program.scaled(scale)).response if scale else unsteered
        with adapter_scaled(artifact, scale):
            compiled = final_states(artifact, texts).response
        kl = divergence(base.model, steered, artifact.model, compiled).mean
        kl_base = divergence(base.model, steered, base.model, unsteered).mean
        scales.append(AdapterScale(scale, kl, kl / kl_base if kl_base else None))
    return scales


@contextmanager
def _randomised(artifact: LoadedModel, seed: int) -> Iterator[None]:
    """Every B A of the adapter replaced by a random product of the same rank and Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    kept = [(A, B, A.clone(), B.clone()) for A, B in _factors(artifact)]
    try:
        for A, B, *_kept in kept:
            norm = _norm(A, B)
            A.copy_(torch.randn(A.shape, generator=generator).to(A))
            B.copy_(torch.randn(B.shape, generator=generator).to(B))
            B.mul_(norm / _norm(A, B))
        yield
    finally:
        for A, B, own_A, own_B in kept:
            A.copy_(own_A)
            B.copy_(own_B)


def _factors(artifact: LoadedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """The adapter's (A [r, d_in], B [d_out, r]), of Linears and of embeddings."""
    for module in artifact.model.modules():
        if isinstance(module, LoraLayer):
            if ADAPTER in module.lora_A:
                yield module.lora_A[ADAPTER].weight.data, module.lora_B[ADAPTER].weight.data
            if ADAPTER in module.lora_embedding_A:
                yield module.lora_embedding_A[ADAPTER].data, module.lora_embedding_B[ADAPTER].data


def _norm(A: Tensor, B: Tensor) -> Tensor:
    """||B A|| by the two Gram matrices, which are small."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=1e-30).sqrt()
