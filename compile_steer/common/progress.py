"""Progress that a stage reports without knowing whether anybody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Advance = Callable[[float], None]


class Progress:
    """Silent; also the interface of the visible one."""

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:  # noqa: ARG002  (the interface)
        """A piece of work of `total` units; the yielded function is called with units just done."""
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Something that is to be known before the work goes on."""


class ProgressBars(Progress):
    """A bar a phase on `console`; on a stream that is no terminal, one line a finished phase."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Advance]:
        columns = (
            TextColumn("  {task.description:<44}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(label, total=total)
            yield lambda done: bars.advance(task, done)
            bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False)
