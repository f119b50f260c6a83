"""Chat templates: which one is used, with which arguments and which date, and what it makes of a conversation."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_steer.common.errors import InternalError, RecipeError, brief

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Some templates print the date. A measurement must not depend on the day it was made on.
DATE = "2026-01-01"
SECONDS = 2.0  # of processor time that a template may take; a long conversation takes a hundredth of one
# What a template is given besides the arguments of a recipe.
_FUNCTIONS = ("strftime_now", "raise_exception", "namespace", "dict")
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", *_FUNCTIONS)
# The arguments by which templates of today are told not to think.
_THINKING = ("enable_thinking", "thinking", "reasoning_effort")
_TAG = r"(?:<\|?|\[)(/?)(think|thinking|thought|reason|reasoning|analysis|scratchpad)(?:\|?>|\])"
CURE = 'Give it one in the recipe, prompt_format: "User: {prompt}\\nAssistant:\\n".'
_PROBE = "Is 7319 a prime number?"


@dataclass(frozen=True)
class ChatSettings:
    """How a recipe uses a model's chat template.

    Attributes:
        arguments: of the template, `{"enable_thinking": False}`.
        name: which template, of a model that has several.
        date: ISO date that a template is told which prints one.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    date: str = DATE


def configure(
    tokenizer: PreTrainedTokenizerBase,
    reference: str,
    prompt_format: str | None = None,
    chat: ChatSettings | None = None,
) -> None:
    """Give the tokenizer the one chat template that is used from here on, and try it once.

    The arguments become defaults within the template and the date a comment, so that what is saved with the tokenizer
    makes the same prompts. Doing it twice is doing it once.

    Raises:
        RecipeError: of several templates none has the name, or the template does not read an argument, cannot be rendered,
            leaves the prompt out, or ends the text before the response.
    """
    chat = chat or ChatSettings()
    if prompt_format is not None:
        tokenizer.chat_template = completion_template(prompt_format, tokenizer)
    if isinstance(tokenizer.chat_template, Mapping) and chat == ChatSettings():
        return  # of a model that is not asked anything it need not be said which; `render` asks
    template = _chosen(tokenizer.chat_template, reference, chat.name)
    if template is None:
        if chat.arguments:
            raise RecipeError(f"chat_template: the model '{reference}' has no chat template that could take arguments.")
        return
    head = _head(chat)
    if head and not template.startswith(head):
        known = _variables(template)
        unknown = [name for name in chat.arguments if name not in known]
        if unknown:
            others = ", ".join(name for name in known if name not in RESERVED)
            raise RecipeError(
                f"chat_template: the chat template of '{reference}' does not read {', '.join(unknown)}; "
                f"it reads {others or 'no arguments'}."
            )
        template = head + template
    tokenizer.chat_template = template
    rendered = render(tokenizer, [("user", _PROBE)])
    if _PROBE not in rendered:
        raise RecipeError(
            f"the chat template of '{reference}' leaves the prompt out (of a user's message it makes {brief(rendered)}). "
            "It may be for content in parts, as of models that see images. Give the model a template for plain text, or a "
            "prompt_format in the recipe."
        )
    end = tokenizer.eos_token
    if end and rendered.rstrip().endswith(end):
        raise RecipeError(
            f"the chat template of '{reference}' ends a prompt with the end-of-text token {end}, so every response would "
            "stand after the end of the text. Give the model a template with a generation prompt, or a prompt_format in the "
            "recipe."
        )


def _chosen(templates: Any, model: str, name: str | None) -> str | None:
    """The template called `name`, or the only one; None where there is none."""
    owner = f"the model '{model}'"
    if isinstance(templates, Mapping):
        name = name or ("default" if "default" in templates else None)
        if name not in templates:
            raise RecipeError(
                f"{owner} has several chat templates ({', '.join(map(str, templates))}){f', none called {name}' if name else ''}. "
                f"Say in the recipe which one to use: chat_template_name: {next(iter(templates), 'NAME')}."
            )
        templates = templates[name]
    elif name is not None:
        raise RecipeError(f"chat_template_name: {owner} has no chat templates with names; leave it out.")
    if not isinstance(templates, str | None):
        raise RecipeError(f"{owner} has a chat template of type {type(templates).__name__}; needed: a text.")
    return templates


def _head(chat: ChatSettings) -> str:
    """What stands before a template so that it has these settings: it adds nothing to what is rendered."""
    date = f"{{#- date: {chat.date} -#}}" if chat.date != DATE else ""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in chat.arguments.items()
    )
    # jinja drops the line break after a tag, so that the template's own first line remains one.
    return f"{date}{defaults or '{%- if true %}{%- endif %}'}\n" if date or defaults else ""


def _literal(value: Any) -> str:
    """A JSON value as jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def completion_template(prompt_format: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template (Jinja) that writes prompts as plain text; a past turn ends with the tokenizer's end token.

    A template is saved with the tokenizer, so that a merged checkpoint gets the prompts that it was compiled for.
    """
    before, after = (json.dumps(part, ensure_ascii=False) for part in prompt_format.split("{prompt}"))
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (
        ("{{ bos_token }}" if begins else "") + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{{ '\\n' }}"
        "{% else %}{{ " + before + " + message['content'] + " + after + " }}{% endif %}{% endfor %}"
    )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> str:
    """Return (role, content) messages as the template writes them, up to where the assistant's response begins.

    Raises `RecipeError` for whatever the template does instead.
    """
    special = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    answer = _answer(_chosen(tokenizer.chat_template, tokenizer.name_or_path, None), tuple(messages), special)
    if "text" not in answer:
        name = tokenizer.name_or_path and f" of '{tokenizer.name_or_path}'"
        raise RecipeError(f"the chat template{name} refuses a conversation ({answer['problem']}).")
    return str(answer["text"])


def open_reasoning(tokenizer: PreTrainedTokenizerBase) -> str:
    """A remark with the cure where the template's prompts end within a model's reasoning; '' where they do not."""
    if tokenizer.chat_template is None:
        return ""
    tail = render(tokenizer, [("user", _PROBE)]).rpartition(_PROBE)[2]
    tags = re.findall(_TAG, tail, re.IGNORECASE)
    if not tags or tags[-1][0]:
        return ""
    known = _variables(tokenizer.chat_template)
    cure = "use a template that closes it, or a prompt_format in the recipe"
    if (switch := next((name for name in _THINKING if name in known), None)) is not None:
        cure = f"set chat_template: {{{switch}: {'low' if 'effort' in switch else 'false'}}} in the recipe"
    return (
        f"the chat template ends every prompt inside <{tags[-1][1]}>: the model answers with reasoning, and that is what is "
        f"measured and steered. If the answer itself is meant, {cure}."
    )


@lru_cache(maxsize=4096)
def _answer(
    template: Any, messages: tuple[tuple[str, str], ...] | None, special: tuple[tuple[str, str], ...] = ()
) -> dict[str, Any]:
    dated = re.match(r"\{#- date: (\d{4}-\d\d-\d\d) -#\}", template)
    date = dated[1] if dated else DATE
    content = messages and [{"role": role, "content": text} for role, text in messages]
    request = {"template": template, "messages": content, "date": date, "special": dict(special), "seconds": SECONDS}
    return _WORKER.ask(request)


def _variables(template: str) -> list[str]:
    """The names that a template reads."""
    answer = _answer(template, None)
    if "variables" not in answer:
        raise RecipeError(f"the chat template cannot be read ({answer['problem']}).")
    return list(answer["variables"])


class _Worker:
    """The process of `template_worker`, started when it is first needed and again when a template has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the worker's answer; a 'problem' where the template took too much time, or ended the process."""
        with self._lock:
            # It may have been killed from outside since the last request (for memory, say).
            process = self._process if self._process is not None and self._process.poll() is None else _start()
            self._process = None  # if this is interrupted, a late answer is not taken for that of the next request
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                if (line := process.stdout.readline()).endswith("\n"):
                    self._process = process
                    return dict(json.loads(line))
                process.wait(timeout=10)
            finally:
                if self._process is None:
                    _stop(process)
        if process.returncode == -signal.SIGPROF:
            return {"problem": f"it does not end; it was stopped after {SECONDS:g} seconds of work"}
        return {"problem": f"it ended the process that renders it, code {process.returncode}"}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _stop(self._process)
            self._process = None


def _start() -> subprocess.Popen[str]:
    # -P: neither this folder's modules (`text`, `load`) nor those of the folder that the command is run in. A session of its
    # own: Ctrl-C is for the command.
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _stop(process)
        raise InternalError("the process that renders chat templates did not start.")
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    with suppress(OSError), process:  # a request that was never read cannot be flushed
        pass


_WORKER = _Worker()
atexit.register(_WORKER.close)
os.register_at_fork(after_in_child=lambda: vars(_WORKER).update(vars(_Worker())))  # a child starts its own
