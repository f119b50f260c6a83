"""A conversation in the terminal: what is kept, turned, refused and shown of it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from io import StringIO

import pytest

from compile_steer.common.errors import RecipeError
from compile_steer.common.terminal import Terminal
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.tools.chat import Chat, parse_sides
from compile_steer.tools.side_by_side import SIDES, Member, Side, SideBySide
from tests.helpers.small_run import SmallRun


@pytest.fixture(scope="module")
def models(original: SmallRun) -> SideBySide:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(original.root)
        return SideBySide.open([Member.read(original.paths.adapter("closed_form"))])


def conversation(models: SideBySide, monkeypatch: pytest.MonkeyPatch, *lines: str, **options: int) -> tuple[Chat, str]:
    """The chat after these lines, and what it printed."""
    out = StringIO()
    chat = Chat(models, Terminal(file=out, **{"width": 80, **options}), SIDES, 1.0, 5)
    monkeypatch.setattr(sys, "__stdin__", StringIO("".join(f"{line}\n" for line in lines)))
    before = sys.stdin, signal.getsignal(signal.SIGINT)
    chat.loop()
    assert (sys.stdin, signal.getsignal(signal.SIGINT)) == before
    return chat, out.getvalue()


def test_each_model_remembers_its_own_answers_until_the_reset(
    models: SideBySide, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Side, Text]] = []
    answer = SideBySide.answer

    def spied(self: SideBySide, side: Side, text: Text, strengths: Sequence[float], tokens: int) -> Iterator[Encoded]:
        asked.append((side, text))
        return answer(self, side, text, strengths, tokens)

    monkeypatch.setattr(SideBySide, "answer", spied)
    conversation(models, monkeypatch, "w42 w43", "", "w9", "/reset", "w9")
    histories = {side: [text.history for asked_side, text in asked if asked_side == side] for side in SIDES}
    for side, (first, second, third) in histories.items():
        ((prompt, said),) = second
        *_, given = answer(models, side, Text("w42 w43"), [1.0], 5)
        assert (first, prompt, said, third) == ((), "w42 w43", models.text(side, given), ())
    assert histories["base"] != histories["steered"]


def test_strength_models_and_length_are_turned_while_talking(
    models: SideBySide, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("/strength 0", "/tokens 3", "w42 w43", "/show compiled,base", "/help", "w9", "/quit", "w77")
    _chat, out = conversation(models, monkeypatch, *lines)
    answers = [line.split() for line in out.splitlines() if line.startswith(("base", "steered", "compiled"))]
    assert [words[0] for words in answers] == ["base", "steered", "compiled", "base", "compiled"]
    assert answers[0][1:] == answers[1][2:] == answers[2][2:]  # off; the others' labels name the strength
    assert len(answers[0]) == 4
    assert "Compiled misses 0.00%" in out
    assert "(now base,compiled)" in out


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    models: SideBySide, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["/strength nan", "/strength", "/show nobody", "/dance", "w7 " * 70, "w9", "w7 " * 60]
    _chat, out = conversation(models, monkeypatch, *lines)
    errors = " ".join(out.split()).split("error: ")[1:]
    needed = ("a number", "a number", "base,steered,compiled", "/help", "do not fit", "do not fit")
    assert [words in error for words, error in zip(needed, errors, strict=True)] == [True] * 6
    assert "/reset" in errors[-1]
    assert "/reset" not in errors[-2]
    with pytest.raises(RecipeError):
        parse_sides("")


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    models: SideBySide, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = SideBySide.answer

    def stopped(self: SideBySide, side: Side, text: Text, strengths: Sequence[float], tokens: int) -> Iterator[Encoded]:
        for part in answer(self, side, text, strengths, tokens):
            yield part
            if text.prompt == "w42":
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SideBySide, "answer", stopped)
    chat, out = conversation(models, monkeypatch, "w42", "w9")
    assert out.count("[stopped]") == 1
    assert [prompt for prompt, _answer in chat._history["base"]] == ["w9"]


def test_nothing_that_a_model_says_acts_on_the_terminal(models: SideBySide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideBySide, "text", lambda *_arguments: "a \x1b[31m [bold]b \x07\u202e")
    for options in ({}, {"width": 120, "force_terminal": True}):
        _chat, out = conversation(models, monkeypatch, "w9", "/\x1b[2J", **options)
        assert "\\x1b" in out
        assert "[bold]" in out
        assert not {"\x07", "\u202e"} & set(out)
        assert "\x1b[31m [" not in out
        assert "\x1b[2J" not in out
