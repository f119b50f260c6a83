"""Progress that a stage reports without knowing whether anybody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from compile_steer.common.detail import Detail

Advance = Callable[[float], None]
_LONG = 60.0  # seconds of a phase that is worth a line in a log


class Progress:
    """Silent; also the interface of the visible one."""

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:  # noqa: ARG002  (the interface)
        """A piece of work of `total` units; the yielded function is called with units just done."""
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Something that is to be known before the work goes on."""

    def remark(self, text: str) -> None:
        """The same, of what a report says too."""
        self.note(text)


class ProgressBars(Progress):
    """A bar a phase on `console`, with the time left, which goes when the phase has ended.

    In full detail it stays; on a stream that is no terminal, a finished phase is then a line, as is one of over a minute.
    """

    def __init__(self, console: Console, detail: Detail = Detail.VERBOSE) -> None:
        self._console, self._verbose = console, detail == Detail.VERBOSE

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:
        width, started = self._console.width, time.monotonic()
        columns = (
            TextColumn(f"  {{task.description:<{min(44, width - 24)}}}", markup=False),
            *([BarColumn(bar_width=min(30, width - 69))] if width >= 80 else []),
            TextColumn("{task.percentage:>3.0f}%"),
            *([TimeElapsedColumn()] if self._verbose else []),
            TimeRemainingColumn(),
        )
        shown = self._verbose or self._console.is_terminal
        with RichProgress(*columns, console=self._console, transient=not self._verbose, disable=not shown) as bars:
            task = bars.add_task(label[: width - 24], total=total)
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=total)
        if not shown and (took := time.monotonic() - started) > _LONG:
            self._console.print(f"  {label}: {took:.0f} s", highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False)

    def remark(self, text: str) -> None:
        if self._verbose:
            self.note(text)
