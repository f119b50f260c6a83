"""How conversations become tokens that know what they are, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.common.errors import RecipeError
from compile_steer.models.text import Text
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; the first `n_prompt` are the prompt, template tokens included.

    `earlier` are the spans (start, stop) of the assistant's responses within the prompt.
    """

    ids: tuple[int, ...]
    n_prompt: int
    earlier: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def from_json(value: dict[str, Any]) -> Encoded:
        """The inverse of `dataclasses.asdict` through JSON, which knows no tuples."""
        return Encoded(tuple(value["ids"]), value["n_prompt"], tuple((start, stop) for start, stop in value["earlier"]))

    @property
    def roles(self) -> list[int]:
        """What each token is: every turn of the assistant is a response, the token before it a last prompt token."""
        found = [PROMPT] * self.n_prompt + [RESPONSE] * (len(self.ids) - self.n_prompt)
        for start, stop in (*self.earlier, (self.n_prompt, self.n_prompt)):
            found[start:stop] = [RESPONSE] * (stop - start)
            found[start - 1] = LAST_PROMPT
        return found


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, and where each row came from. All tensors are [batch, time]."""

    input_ids: Tensor
    attention_mask: Tensor
    roles: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.roles.to(device), self.rows)

    @property
    def predicts_response(self) -> Tensor:
        """Boolean [batch, time]: positions whose next token belongs to the response."""
        following = torch.zeros_like(self.roles, dtype=torch.bool)
        following[:, :-1] = self.roles[:, 1:] == RESPONSE
        return following

    @property
    def n_tokens(self) -> int:
        return int(self.attention_mask.sum())


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> str:
    """The conversation up to the response as the model sees it: through the chat template, or a plain prompt as it is.

    Raises:
        RecipeError: there are earlier turns or a system prompt, and no template that could tell them apart.
    """
    if tokenizer.chat_template is None:
        if text.history:
            raise RecipeError("data: a conversation of several turns needs a model with a chat template.")
        if text.system:
            raise RecipeError("data: a system prompt needs a model with a chat template; ask in the prompt instead.")
        return text.prompt
    messages = [{"role": "system", "content": text.system}] if text.system else []
    messages += [
        {"role": role, "content": said}
        for turn in text.history
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    messages.append({"role": "user", "content": text.prompt})
    try:
        found = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise RecipeError(f"data: the model's chat template refuses a conversation ({error}).") from error
    if text.system.strip() not in found:
        raise RecipeError("data: the model's chat template leaves the system prompt out; ask in the prompt instead.")
    return found


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoded:
    """Tokenise prompts and responses apart, so that a boundary is the same whatever the response.

    Raises:
        RecipeError: the template rewrites earlier turns, so that their positions cannot be told.
    """
    # A chat template writes its special tokens itself; a plain prompt needs the tokenizer's own.
    special = tokenizer.chat_template is None
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    said = ""
    for turn in range(len(text.history) + 1):
        last = turn == len(text.history)
        user, response = (text.prompt, text.response) if last else text.history[turn]
        whole = prompt_text(tokenizer, Text(user, history=text.history[:turn], system=text.system))
        if not whole.startswith(said):
            raise RecipeError(
                "data: the chat template rewrites earlier turns (it gives other text for them once they are past), so the "
                "positions of their responses cannot be told. Use conversations of one turn."
            )
        ids += tokenizer(whole[len(said) :], add_special_tokens=special)["input_ids"]
        joint = " " if special and response and not response[0].isspace() else ""
        answer = tokenizer(joint + response, add_special_tokens=False)["input_ids"] if response else []
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
        said = whole + response
    return Encoded(tuple(ids), spans[-1][0], tuple(spans[:-1]))


def batches(encoded: Sequence[Encoded], pad_id: int, *, max_tokens: int = 4096) -> Iterator[Batch]:
    """Right-padded batches of similar length, each of at most `max_tokens` padded tokens."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(encoded[index].ids) > max_tokens:
            yield pad(encoded, group, pad_id)
            group = []
        group.append(index)
    if group:
        yield pad(encoded, group, pad_id)


def pad(encoded: Sequence[Encoded], rows: Iterable[int], pad_id: int) -> Batch:
    """One right-padded batch of the chosen rows."""
    chosen = tuple(rows)
    time = max(len(encoded[row].ids) for row in chosen)
    input_ids = torch.full((len(chosen), time), pad_id, dtype=torch.long)
    roles = torch.full((len(chosen), time), PAD, dtype=torch.int8)
    for at, row in enumerate(chosen):
        one = encoded[row]
        input_ids[at, : len(one.ids)] = torch.tensor(one.ids)
        roles[at, : len(one.ids)] = torch.tensor(one.roles, dtype=torch.int8)
    return Batch(input_ids, (roles != PAD).long(), roles, chosen)
