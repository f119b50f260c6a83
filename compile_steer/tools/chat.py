"""A conversation in the terminal with the base, the steered and the compiled model at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text as Words

from compile_steer.common.detail import Detail, detail
from compile_steer.common.errors import CompileSteerError, RecipeError, brief, plain
from compile_steer.models.text import Text
from compile_steer.models.tokens import Encoded
from compile_steer.tools.side_by_side import SIDES, AnswerDivergence, Side, SideBySide

_COLUMNS = 100  # of a terminal: from here on the answers stand beside each other
_STYLES: dict[Side, str] = {"base": "dim", "steered": "cyan", "compiled": "green"}
_HELP = """\
/strength X   factor on the steering, 0 to turn it off (now {strength:g}); an adapter follows, a merged model cannot
/show A,B     which models answer: base, steered, compiled (now {shown})
/tokens N     the longest answer (now {tokens})
/reset        forget what was said
/quit         or Ctrl-D. Ctrl-C stops an answer"""
_STATE = "strength {strength:g}, {shown}, at most {tokens} tokens"


def parse_sides(text: str) -> tuple[Side, ...]:
    """The models named in 'base,steered', in the usual order; raises `RecipeError`."""
    names = {name.strip() for name in text.split(",")}
    if not names <= set(SIDES):
        raise RecipeError(f"show: found {brief(text)}; needed: one or more of {','.join(SIDES)}.")
    return tuple(side for side in SIDES if side in names)


@dataclass(frozen=True)
class Turn:
    """A prompt, its answers as texts, and the comparison on the steered one; None where not all three answered."""

    prompt: str
    strength: float
    answers: dict[Side, str]
    divergence: AnswerDivergence | None

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        content: dict[str, Any] = {"prompt": self.prompt, "strength": self.strength, "answers": self.answers}
        if (d := self.divergence) is not None:
            kl, kl_base = float(d.compiled.mean()), float(d.base.mean())
            content |= {"tokens": len(d.base), "kl": kl, "kl_base": kl_base, "kl_limit": d.limit}
            content |= {"passed": None if d.limit is None else d.passed, "note": d.note}
        return content


class Chat:
    """The state of one conversation. Each model remembers its own answers."""

    def __init__(
        self, models: SideBySide, console: Console, shown: Sequence[Side], strength: float, max_new_tokens: int
    ) -> None:
        self._models, self._console = models, console
        self._shown, self._strength, self._max_new_tokens = tuple(shown), strength, max_new_tokens
        self._history: dict[Side, list[tuple[str, str]]] = {side: [] for side in SIDES}

    def ask(self, prompt: str) -> Turn:
        """Answer a prompt by the models that are shown, and print the answers while they grow; raises `RecipeError`."""
        models, strengths = self._models, [self._strength]
        answers = dict[Side, Encoded]()
        growing = {
            side: models.answer(side, Text(prompt, history=tuple(self._history[side])), strengths, self._max_new_tokens)
            for side in self._shown
        }
        try:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while growing:
                    for side, parts in list(growing.items()):  # in turn, so that they grow beside each other
                        if (answer := next(parts, None)) is None:
                            del growing[side]
                        else:
                            answers[side] = answer
                            live.update(self._table(answers), refresh=self._console.is_terminal)
        finally:  # also what there is of an answer that was stopped
            if answers and detail.get() > Detail.QUIET:
                self._console.print(self._table(answers))
        texts = {side: models.text(side, answer) for side, answer in answers.items()}
        divergence = models.compare(answers["steered"], strengths) if len(answers) == len(SIDES) else None
        if divergence is not None:
            style = "yellow" if divergence.limit is None else "green" if divergence.passed else "bold red"
            self._console.print(Words(str(divergence), style), soft_wrap=True)
        # Without a chat template nothing could mark whose turn it is.
        if models.base.tokenizer.chat_template is not None:
            for side, text in texts.items():
                self._history[side].append((prompt, text))
        return Turn(prompt, self._strength, texts, divergence)

    def _table(self, answers: dict[Side, Encoded]) -> Table:
        """The answers so far, beside each other where the terminal is wide enough, else below each other."""
        text = self._models.text
        cells = {
            side: Words(plain(text(side, answers[side])) if side in answers else "", _STYLES[side])
            for side in self._shown
        }
        if self._console.is_terminal and self._console.width >= _COLUMNS and len(self._shown) > 1:
            table = Table(box=None, expand=True, pad_edge=False)
            for side in cells:
                table.add_column(self._label(side), ratio=1, header_style=f"bold {_STYLES[side]}", overflow="fold")
            table.add_row(*cells.values())
            return table
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for side, words in cells.items():
            table.add_row(Words(self._label(side), f"bold {_STYLES[side]}"), words)
        return table

    def _label(self, side: Side) -> str:
        follows = side == "steered" or (side == "compiled" and self._models.scalable)
        return f"{side} x{self._strength:g}" if follows and self._strength != 1 else side

    def loop(self) -> None:
        """Read prompts and commands from standard input until it ends."""
        models, out = self._models, self._console
        start = f"{models.members[0].folder} on {models.base.id}. /help lists the commands, Ctrl-D ends."
        out.print(start, soft_wrap=True, highlight=False)
        if models.base.tokenizer.chat_template is None:
            out.print("The model has no chat template: every prompt is answered by itself.")
        with _keyboard():
            while (line := self._read()) is not None:
                try:
                    if line.startswith("/"):
                        self._command(*line[1:].split(maxsplit=1))
                    elif line:
                        self.ask(line)
                except CompileSteerError as error:
                    out.print(*(Words(f"error: {problem}", "red") for problem in error.problems), sep="\n")
                    if any(self._history.values()) and not line.startswith("/"):
                        out.print("/reset forgets what was said, where that is what does not fit.")
                except KeyboardInterrupt:
                    out.print("[stopped]")
                except EOFError:
                    return

    @staticmethod
    def _read() -> str | None:
        """The next line; None where the user ends the conversation."""
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None

    def _command(self, name: str = "", value: str = "") -> None:
        """Do what a line that begins with / asks for; raises `RecipeError` with what it should have been, `EOFError` to end."""
        if name in ("quit", "exit", "q"):
            raise EOFError
        if name == "reset":
            self._history = {side: [] for side in SIDES}
        elif name == "show":
            self._shown = parse_sides(value)
        elif name == "strength":
            self._strength = _number("strength", value, -1e6)
        elif name == "tokens":
            self._max_new_tokens = int(_number("tokens", value, 1))
        elif name != "help":
            raise RecipeError(f"/{name} is no command; /help lists them.")
        state = {"strength": self._strength, "shown": ",".join(self._shown), "tokens": self._max_new_tokens}
        self._console.print((_HELP if name == "help" else _STATE).format(**state), highlight=False)


def _number(name: str, text: str, low: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= 1e6:
        raise RecipeError(f"/{name}: found {brief(text)}; needed: a number from {low:g} to 1e6.")
    return value


@contextmanager
def _keyboard() -> Iterator[None]:
    """Read from the real standard input, which commands have not; Ctrl-C interrupts an answer instead of the process."""
    ours, handler = sys.stdin, signal.getsignal(signal.SIGINT)
    if sys.__stdin__ is not None:
        sys.stdin = sys.__stdin__
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  (gives `input` a line that can be edited, and a history)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        sys.stdin = ours
