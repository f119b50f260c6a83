"""Conversations as tokens with a role each, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from compile_steer.common.errors import RecipeError
from compile_steer.models.load import LoadedModel
from compile_steer.models.text import Text
from compile_steer.steering.hooks import LAST_PROMPT, PAD, PROMPT, RESPONSE


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation."""

    ids: tuple[int, ...]  # template tokens included
    n_prompt: int  # how many of them come before the last response
    earlier: tuple[tuple[int, int], ...] = ()  # spans (start, stop) of the assistant's responses within the prompt

    @staticmethod
    def from_json(value: dict[str, Any]) -> Encoded:
        """The inverse of `dataclasses.asdict`; JSON has lists where we have tuples."""
        return Encoded(tuple(value["ids"]), value["n_prompt"], tuple((start, stop) for start, stop in value["earlier"]))

    @property
    def roles(self) -> list[int]:
        """The role of each token; every turn of the assistant is a response, and the token before it a last prompt token."""
        roles = [PROMPT] * self.n_prompt + [RESPONSE] * (len(self.ids) - self.n_prompt)
        for start, stop in (*self.earlier, (self.n_prompt, self.n_prompt)):
            roles[start:stop] = [RESPONSE] * (stop - start)
            roles[start - 1] = LAST_PROMPT
        return roles


@dataclass(frozen=True)
class Batch:
    """A padded batch; all tensors are [batch, time], and `rows` are the indices of its texts."""

    input_ids: Tensor
    attention_mask: Tensor
    roles: Tensor
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.roles.to(device), self.rows)

    @property
    def predicts_response(self) -> Tensor:
        """Boolean [batch, time]: positions whose next token belongs to a response."""
        return functional.pad(self.roles[:, 1:] == RESPONSE, (0, 1))  # the last position has no next token


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> str:
    """Return the conversation up to the last response, as the model sees it: through the chat template if it has one.

    Raises `RecipeError` for earlier turns or a system prompt that no template could mark.
    """
    if tokenizer.chat_template is None:
        if text.history:
            raise RecipeError("data: a conversation of several turns needs a model with a chat template.")
        if text.system:
            raise RecipeError("data: a system prompt needs a model with a chat template; ask in the prompt instead.")
        return text.prompt
    messages = [{"role": "system", "content": text.system}] if text.system else []
    for user, assistant in text.history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": text.prompt})
    try:
        rendered = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise RecipeError(f"data: the model's chat template refuses a conversation ({error}).") from error
    if text.system.strip() not in rendered:
        raise RecipeError("data: the model's chat template leaves the system prompt out; ask in the prompt instead.")
    return rendered


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoded:
    """Tokenise prompts and responses separately, so that a prompt has the same tokens whatever the response.

    Raises `RecipeError` if the template rewrites earlier turns, so that their positions are unknown.
    """
    # A chat template writes its special tokens itself; a plain prompt needs the tokenizer's own.
    special = tokenizer.chat_template is None
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    done = ""  # the part of the conversation that is in `ids`
    for turn, (user, response) in enumerate((*text.history, (text.prompt, text.response))):
        rendered = prompt_text(tokenizer, Text(user, history=text.history[:turn], system=text.system))
        if not rendered.startswith(done):
            raise RecipeError(
                "data: the chat template rewrites earlier turns (it renders them differently once they are past), so the "
                "positions of their responses are unknown. Use conversations of one turn."
            )
        ids += tokenizer(rendered[len(done) :], add_special_tokens=special)["input_ids"]
        # Without a template nothing separates the response from the prompt's last word.
        space = " " if special and response and not response[0].isspace() else ""
        answer = tokenizer(space + response, add_special_tokens=False)["input_ids"] if response else []
        spans.append((len(ids), len(ids) + len(answer)))
        ids += answer
        done = rendered + response
    return Encoded(tuple(ids), spans[-1][0], tuple(spans[:-1]))


def batches(loaded: LoadedModel, encoded: Sequence[Encoded], *, max_tokens: int = 4096) -> Iterator[Batch]:
    """Right-padded batches on the model's device, of similar lengths, each of at most `max_tokens` padded tokens."""
    group: list[int] = []
    for index in sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids)):
        # Texts come in order of length, so that this one is the longest of its batch.
        if group and (len(group) + 1) * len(encoded[index].ids) > max_tokens:
            yield pad(encoded, group, loaded.pad_id).to(loaded.device)
            group = []
        group.append(index)
    if group:
        yield pad(encoded, group, loaded.pad_id).to(loaded.device)


def pad(encoded: Sequence[Encoded], rows: Iterable[int], pad_id: int, *, left: bool = False) -> Batch:
    """One batch, on the CPU, of the texts with the indices `rows`, padded on the right (or left)."""
    rows, side = tuple(rows), "left" if left else "right"
    ids = [torch.tensor(encoded[row].ids, dtype=torch.long) for row in rows]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    kinds = [torch.tensor(encoded[row].roles, dtype=torch.int8) for row in rows]
    roles = pad_sequence(kinds, batch_first=True, padding_value=PAD, padding_side=side)
    return Batch(input_ids, (roles != PAD).long(), roles, rows)
