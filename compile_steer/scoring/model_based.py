"""Scorers that need the model: its choice of a letter, a reply's perplexity under it, and whether the reply ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from compile_steer.common.errors import RecipeError
from compile_steer.models.text import Text
from compile_steer.scoring.base import Reply, Score, ScorerBase

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from compile_steer.data.behaviour import Behaviour
    from compile_steer.models.load import LoadedModel


class Choice(ScorerBase):
    """1 if the reply is the right letter of its prompt's question; the letter is chosen, not generated.

    Wrong if a model prefers a position to an answer: one that always says A scores the fraction of questions whose
    right answer is A. Shuffle the choices, and compare the score with that fraction.
    """

    unfit_for_data_texts: ClassVar[str] = "a choice is made by the model and cannot be scored on given texts"

    kind: Literal["choice"]

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        right = {prompt: question.letters[question.answer] for prompt, question in behaviour.questions.items()}
        prompts = [pair.prompt for pair in (*behaviour.validation, *behaviour.test)]
        missing = [prompt for prompt in prompts if prompt not in right]
        if missing:
            raise RecipeError(
                f"validate.score choice: {len(missing)} of the {len(prompts)} prompts of data.validation and data.test are "
                f"not multiple-choice questions, the first '{missing[0]}'. Use labelled questions, or another scorer."
            )
        # A steering vector towards one letter would be a perfect one.
        letters = {right[prompt] for prompt in prompts}
        if len(letters) == 1:
            raise RecipeError(
                f"validate.score choice: the right letter of all {len(prompts)} questions of data.validation and data.test "
                f"is {letters.pop()}, so a model that always says that letter is right. Shuffle the choices."
            )
        # Refused here rather than in the middle of a sweep.
        for choices in {question.letters for question in behaviour.questions.values()}:
            letter_tokens(loaded.tokenizer, choices)
        return lambda replies: np.array([float(reply.text == right[reply.prompt]) for reply in replies])

    @property
    def needs_no_labels(self) -> bool:
        return False


def letter_tokens(tokenizer: PreTrainedTokenizerBase, letters: Sequence[str]) -> list[int]:
    """Return the token of each letter where it begins the assistant's reply.

    Raises:
        RecipeError: a letter is not one token there, is unknown to the tokenizer, or is the same token as another.
    """
    from compile_steer.models.tokens import encode

    tokens = []
    for letter in letters:
        # After a prompt: a letter at the start of a text may be another token than one in the middle.
        encoded = encode(tokenizer, Text("", letter))
        tokens.append(encoded.ids[encoded.n_prompt :])
    problems = [
        f"'{letter}' is {len(ids)} tokens" if len(ids) != 1 else f"'{letter}' is unknown"
        for letter, ids in zip(letters, tokens, strict=True)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id
    ]
    if not problems and len(set(tokens)) < len(letters):
        problems = [f"{', '.join(letters)} are not all different tokens"]
    if problems:
        raise RecipeError(
            "multiple choice needs letters that are one token each at the start of a reply; for this model's tokenizer "
            f"{'; '.join(problems)}. Use other letters."
        )
    return [ids[0] for ids in tokens]


class Perplexity(ScorerBase):
    """1 if the reply's perplexity under the base is within the limits, 0 for an empty reply. Combine it with others.

    `max` limits the perplexity of the reply after its prompt: text that the base would hardly write. `min` limits the
    perplexity of the reply alone, because after its prompt a model's own greedy answer is predictable too: Stolfo et
    al. (2410.12877) call a text degenerate below 2.5. Wrong for fluent text: false, irrelevant or unsteered text is as
    probable as any; and a loop of rare words is not predictable to a small model.
    """

    unfit_for_data_texts: ClassVar[str] = "the perplexity of a model's own replies differs from that of given texts"

    kind: Literal["perplexity"]
    max: float | None = Field(None, gt=1, description="largest perplexity of the reply after its prompt")
    min: float | None = Field(None, gt=1, description="smallest perplexity of the reply alone")

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("give max, min, or both")
        return self

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002
        # Always under the base that is bound here, whichever model wrote the replies.
        def score(replies: Sequence[Reply]) -> np.ndarray:
            passed = np.array([bool(reply.text.strip()) for reply in replies])
            if self.max is not None:
                passed &= perplexities(loaded, replies) <= self.max
            if self.min is not None:
                passed &= perplexities(loaded, replies, alone=True) >= self.min
            return passed.astype(float)

        return score


def perplexities(loaded: LoadedModel, replies: Sequence[Reply], *, alone: bool = False) -> np.ndarray:
    """Return the perplexity [n] of each reply after its prompt, or `alone`; infinite for an empty reply."""
    from compile_steer.models.logprobs import mean_logprobs
    from compile_steer.models.tokens import Encoded, encode, plain_ids

    tokenizer = loaded.tokenizer
    # Without a prompt something must predict the first token.
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encoded(reply: Reply) -> Encoded:
        if not alone:
            return encode(tokenizer, Text(reply.prompt, reply.text))
        return Encoded((start, *plain_ids(tokenizer, reply.text)), 1)

    result = np.full(len(replies), np.inf)
    written = [index for index, reply in enumerate(replies) if reply.text.strip()]
    result[written] = np.exp(-mean_logprobs(loaded, [encoded(replies[index]) for index in written]))
    return result


class Ended(ScorerBase):
    """1 if the model ended its turn by itself before the limit of new tokens.

    Wrong for a model that ends at once: an empty reply has ended too.
    """

    unfit_for_data_texts: ClassVar[str] = "given texts do not show whether a model ends its turn"

    kind: Literal["ended"]

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:  # noqa: ARG002
        return lambda replies: np.array([float(reply.ended) for reply in replies])
