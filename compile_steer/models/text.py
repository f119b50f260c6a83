"""Conversations as plain text. Imports no torch, so that reading data and recipes stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Whose activations stand for a text: the mean over the response, or the token that predicts the response's first one.
Readout = Literal["response_mean", "last_prompt"]


@dataclass(frozen=True)
class Text:
    """A user prompt and the assistant's response to it.

    Attributes:
        prompt: the last user turn.
        response: the answer to it; empty where only the prompt matters.
        history: earlier (user, assistant) turns, oldest first.
        system: the system prompt; if empty, the chat template may insert its own default.
    """

    prompt: str
    response: str = ""
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in the behaviour, and the plain prompt that both were made from."""

    positive: Text
    negative: Text
    prompt: str
