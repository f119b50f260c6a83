"""Multiple choice: is the letter that the model chose the right one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.common.errors import RecipeError
from compile_steer.data.behaviour import Behaviour
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.models.tokens import encode
from compile_steer.scoring.reply import Reply, Score, ScorerBase


class Choice(ScorerBase):
    """1 if the reply is the right letter of its prompt's question; the letter is chosen, not generated.

    Wrong where a model prefers a place to an answer: one that always says A scores the share of questions whose right
    answer is A. Shuffle the choices, and read the score beside that share.
    """

    kind: Literal["choice"]

    def bind(self, loaded: LoadedModel, behaviour: Behaviour) -> Score:
        right = {prompt: question.letters[question.answer] for prompt, question in behaviour.questions.items()}
        asked = [pair.prompt for pair in (*behaviour.validation, *behaviour.test)]
        missing = [prompt for prompt in asked if prompt not in right]
        if missing:
            raise RecipeError(
                f"validate.score choice: {len(missing)} of the {len(asked)} prompts of data.validation and data.test are no "
                f"multiple-choice questions, the first '{missing[0]}'. Give labelled questions, or score by another kind."
            )
        letters = {right[prompt] for prompt in asked}
        if len(letters) == 1:
            raise RecipeError(
                f"validate.score choice: the right letter of all {len(asked)} questions of data.validation and data.test is "
                f"{letters.pop()}, so a model that knows nothing but that letter is right. Shuffle the choices."
            )
        for choices in {question.letters for question in behaviour.questions.values()}:
            letter_tokens(loaded.tokenizer, choices)

        def score(replies: Sequence[Reply]) -> np.ndarray:
            return np.array([float(reply.text == right[reply.prompt]) for reply in replies])

        return score

    @property
    def of_any_prompt(self) -> bool:
        return False

    def on_texts(self) -> str:
        return "a choice is the model's, not a text's"


def letter_tokens(tokenizer: PreTrainedTokenizerBase, letters: Sequence[str]) -> list[int]:
    """The token of each letter where it begins the assistant's reply.

    Raises:
        RecipeError: a letter is not one token there, is unknown to the tokenizer, or is the same token as another.
    """
    found = []
    for letter in letters:
        one = encode(tokenizer, Text("", letter))
        found.append(one.ids[one.n_prompt :])
    bad = [
        f"'{letter}' is {len(ids)} tokens" if len(ids) != 1 else f"'{letter}' is unknown"
        for letter, ids in zip(letters, found, strict=True)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id
    ]
    if not bad and len(set(found)) < len(letters):
        bad = [f"{', '.join(letters)} are not all different tokens"]
    if bad:
        raise RecipeError(
            f"multiple choice needs letters that are one token each at the start of a reply; for this model's tokenizer "
            f"{'; '.join(bad)}. Use other letters."
        )
    return [ids[0] for ids in found]
