"""The same prompts put otherwise, as users do: does the behaviour hold there, and does what was compiled match?"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compile_steer.common.errors import RecipeError
from compile_steer.models.text import Text

if TYPE_CHECKING:
    from compile_steer.models.load import LoadedModel
    from compile_steer.models.tokens import Encoded


@dataclass(frozen=True)
class Wording:
    """One way to put a prompt.

    Attributes:
        template: what the prompt becomes.
        system: a system prompt before it.
        turns: exchanges before it.
        chat: False if it is given to the model as plain text, without the chat template.
    """

    name: str
    template: str = "{prompt}"
    system: str = ""
    turns: int = 0
    chat: bool = True


WORDINGS = (
    Wording("please tell me", "Please tell me: {prompt}"),
    Wording("polite", "Hello! I would like to ask you something. {prompt} Thank you in advance."),
    Wording("role", "You are a teacher in front of a class. {prompt}"),
    Wording("another language", "Bitte beantworte mir diese Frage: {prompt}"),
    Wording(
        "system prompt", system="You are a careful assistant of a public library. Answer briefly and to the point."
    ),
    Wording("history", turns=3),
    Wording("no chat template", chat=False),
)


def worded(
    loaded: LoadedModel, texts: Sequence[Text], earlier: Sequence[Text], new_tokens: int = 0
) -> tuple[dict[str, list[Encoded]], list[str]]:
    """Encode the texts in every wording that the model can have; returns them by name, and why one is missing.

    Args:
        earlier: prompts with responses, of which the earlier turns are made.
        new_tokens: that will follow.
    """
    from compile_steer.models.tokens import encode, require_room  # not with the module: they import torch

    bare, by_name, remarks = copy(loaded.tokenizer), {}, []
    bare.chat_template = None
    turns = tuple((text.prompt, text.response) for text in earlier)
    for wording in WORDINGS:
        if not wording.chat and loaded.tokenizer.chat_template is None:
            continue  # so they are put anyway
        before, tokenizer = turns[: wording.turns], loaded.tokenizer if wording.chat else bare
        put = [
            replace(
                text,
                prompt=wording.template.replace("{prompt}", text.prompt),
                system=wording.system or text.system,
                history=before or text.history,
            )
            for text in texts
        ]
        try:
            encoded = [encode(tokenizer, text) for text in put]
            require_room(loaded, encoded, new_tokens)
        except RecipeError as error:  # no chat template, one without a system role, or too few positions
            remarks.append(f"not measured in the wording {wording.name} ({error.problems[0].removeprefix('data: ')})")
            continue
        by_name[wording.name] = encoded
    return by_name, remarks
