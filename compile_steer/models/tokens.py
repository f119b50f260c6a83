"""Conversations as tokens with a role each, and padded batches of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from compile_steer.common import distributed
from compile_steer.common.errors import RecipeError, brief
from compile_steer.models.chat import CURE, render
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
    own_of: Batch | None = None  # the batch that these rows of one process are of

    def to(self, device: torch.device) -> Batch:
        tensors = self.input_ids.to(device), self.attention_mask.to(device), self.roles.to(device)
        return Batch(*tensors, self.rows, self.own_of)

    def select(self, chosen: Tensor) -> Batch:
        """The texts where `chosen`, boolean [batch], is true."""
        rows = tuple(row for row, keep in zip(self.rows, chosen.tolist(), strict=True) if keep)
        return Batch(self.input_ids[chosen], self.attention_mask[chosen], self.roles[chosen], rows)

    @property
    def whole(self) -> Batch:
        """The batch with the rows of all processes."""
        return self.own_of or self

    @property
    def n_tokens(self) -> int:
        """Real tokens of all processes."""
        return int((self.whole.roles != PAD).sum())

    def own(self) -> Batch:
        """The rows of this process, padded as before; where it has none, a row whose tokens count as padding.

        So every process runs every batch: a sharded model needs all of them at each block.
        """
        if distributed.count() == 1:
            return self
        rows = torch.tensor(distributed.share(range(len(self.rows))) or [0])
        roles = self.roles[rows] if distributed.rank() < len(self.rows) else torch.full_like(self.roles[:1], PAD)
        texts = tuple(self.rows[row] for row in rows.tolist())
        return Batch(self.input_ids[rows], self.attention_mask[rows], roles, texts, self)

    @property
    def predicts_response(self) -> Tensor:
        """Boolean [batch, time]: positions whose next token belongs to a response."""
        return functional.pad(self.roles[:, 1:] == RESPONSE, (0, 1))  # the last position has no next token


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> str:
    """Return the conversation up to the last response, as the model sees it: through the chat template if it has one.

    Raises `RecipeError` for earlier turns or a system prompt that no template could mark, and for a template that cannot
    be rendered or leaves the system prompt out.
    """
    if tokenizer.chat_template is None:
        if text.history:
            raise RecipeError(f"data: a conversation of several turns needs a model with a chat template. {CURE}")
        if text.system:
            raise RecipeError(f"data: a system prompt needs a model with a chat template. {CURE}")
        return text.prompt
    messages = [("system", text.system)] if text.system else []
    for user, assistant in text.history:
        messages += [("user", user), ("assistant", assistant)]
    rendered = render(tokenizer, [*messages, ("user", text.prompt)])
    if text.system.strip() not in rendered:
        raise RecipeError("data: the model's chat template leaves the system prompt out; ask in the prompt instead.")
    return rendered


def encode(tokenizer: PreTrainedTokenizerBase, text: Text) -> Encoded:
    """Tokenise a conversation so that a prompt has the same tokens whatever the response.

    What reads like a control token in the text is encoded as the plain text that it is.

    Raises `RecipeError` as `prompt_text` does; if the template rewrites earlier turns, so that their positions are unknown;
    and if the tokenizer has no plain text for a control token.
    """
    return encode_checked(tokenizer, text)[0]


def encode_checked(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[Encoded, bool]:
    """Return what `encode` does, and whether the tokenizer makes the same tokens of the whole conversation at once."""
    has_template = tokenizer.chat_template is not None
    start_ids = () if has_template else _traits(tokenizer, "")[0]  # a template writes its special tokens itself
    text, split = _as_plain_text(tokenizer, text)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    done, joined = "", True  # the part of the conversation that is in `ids`

    def add(part: str) -> None:
        # A part is encoded within its text: alone, some tokenizers put a space before it. Where a token would reach across
        # the border, the part is encoded alone, because a prompt is what it is before the response is known.
        nonlocal done, joined
        whole = split(done + part)
        fits = whole[: len(ids)] == ids
        ids.extend(whole[len(ids) :] if fits else split(part))
        done, joined = done + part, joined and fits

    for turn, (user, response) in enumerate((*text.history, (text.prompt, text.response))):
        rendered = prompt_text(tokenizer, Text(user, history=text.history[:turn], system=text.system))
        if not rendered.startswith(done):
            raise RecipeError(
                "data: the chat template rewrites earlier turns (it renders them differently once they are past), so the "
                "positions of their responses are unknown. Use conversations of one turn."
            )
        if user.strip() not in rendered[len(done) :]:
            raise RecipeError(
                f"data: the model's chat template leaves out or changes the prompt {brief(user)}. Give the model a template "
                "for plain text, or a prompt_format in the recipe."
            )
        add(rendered[len(done) :])
        start = len(ids)
        if response:
            # Without a template nothing separates the response from the prompt's last word.
            add(response if has_template or response[0].isspace() else f" {response}")
        spans.append((start, len(ids)))
    return Encoded((*start_ids, *ids), len(start_ids) + spans[-1][0], tuple(spans[:-1])), joined


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text alone, in which nothing is a control token; raises `RecipeError` where that cannot be."""
    text_as_response, split = _as_plain_text(tokenizer, Text("", text))
    return split(text_as_response.response)


def require_room(loaded: LoadedModel, encoded: Sequence[Encoded], new_tokens: int = 0) -> None:
    """Raise `RecipeError` for texts that, with the tokens to be generated, are longer than what the model has learned."""
    longest = max(encoded, key=lambda text: len(text.ids), default=None)
    if longest is not None and loaded.positions is not None and len(longest.ids) + new_tokens > loaded.positions:
        raise RecipeError(too_long(loaded, longest, new_tokens))


def too_long(loaded: LoadedModel, text: Encoded, new_tokens: int, count: str = "") -> str:
    """What is wrong with a text that does not fit, in words."""
    start = loaded.tokenizer.decode(list(text.ids[:48]))
    more = f" and up to {new_tokens} that follow" if new_tokens else ""
    return f"{count}{len(text.ids)} tokens{more} do not fit into the model's {loaded.positions} positions: the text {brief(start)}."


@dataclass(frozen=True)
class _Control:
    """Added tokens that a text from outside must not become."""

    ids: frozenset[int]
    pattern: re.Pattern[str]

    @staticmethod
    def of(tokens: Mapping[int, str]) -> _Control:
        longest_first = sorted(tokens.values(), key=len, reverse=True)
        return _Control(frozenset(tokens), re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


@lru_cache(maxsize=4)
def _traits(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[tuple[int, ...], _Control, _Control]:
    """What a tokenizer puts before every text, and the control tokens of prompts and of responses."""
    # What a tokenizer puts behind every text, an end, would stand between prompt and response.
    alone, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((n for n in range(len(whole)) if whole[n : n + len(alone)] == alone), 0)
    # The unknown token, which no other token is for, controls nothing.
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = (tokenizer.unk_token, getattr(model, "unk_token", None))
    # A model says its reasoning and tool calls in added tokens that are not special. In a response they are what they are;
    # in a prompt they would be a part that only the template may write.
    added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    responses = {n: token.content for n, token in added.items() if token.special and token.content not in unknown}
    written = {n: t.content for n, t in added.items() if t.content in template and not t.content.isalnum()}
    return tuple(whole[:start]), _Control.of(responses | written), _Control.of(responses)


def _as_plain_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[Text, Callable[[str], list[int]]]:
    """Return a conversation, with what would be a control token marked, and the function that makes tokens of its parts."""
    _start, in_prompt, in_response = _traits(tokenizer, str(tokenizer.chat_template or ""))

    def split(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    def split_marked(part: str) -> list[int]:
        return list(encode_marked_chat(tokenizer, part))

    def mark(key: str, part: str, control: _Control) -> str:
        marked = str(mark_control_tokens(part, control.pattern))
        try:
            plain = control.ids.isdisjoint(split_marked(marked))
        except ValueError:  # its plain text is the token again
            plain = False
        if not plain:
            written = control.pattern.search(part)
            token = f"the control token {written[0]}" if written else "a control token"
            raise RecipeError(
                f"data: {key}: the model's tokenizer reads {token} in the text {brief(part)}. Take it out."
            )
        return marked

    parts = [(text.prompt, in_prompt), (text.system, in_prompt), (text.response, in_response)]
    parts += [part for user, reply in text.history for part in ((user, in_prompt), (reply, in_response))]
    if all(control.ids.isdisjoint(split(part)) for part, control in parts if part):
        return text, split
    history = tuple(
        (mark("history", user, in_prompt), mark("history", reply, in_response)) for user, reply in text.history
    )
    prompt, system = mark("prompt", text.prompt, in_prompt), mark("system", text.system, in_prompt)
    return Text(prompt, mark("response", text.response, in_response), history, system), split_marked


def batches(loaded: LoadedModel, encoded: Sequence[Encoded], *, max_tokens: int = 4096) -> Iterator[Batch]:
    """Right-padded batches on the model's device, of similar lengths, each of at most `max_tokens` padded tokens.

    Raises `RecipeError` for a text that is longer than what the model has learned.
    """
    require_room(loaded, encoded)
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
