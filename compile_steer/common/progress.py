"""Progress that a stage reports without knowing whether anybody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tick = Callable[[float], None]


class Meter:
    """Silent; also the interface of the visible one."""

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Tick]:  # noqa: ARG002  (the interface)
        """A piece of work of `total` units; the yielded function is called with units just done."""
        yield lambda _done: None

    def note(self, text: str) -> None:
        """Something that is to be known before the work goes on."""


class BarMeter(Meter):
    """A bar a phase on `console`; on a stream that is no terminal, one line a finished phase."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, label: str, total: float) -> Iterator[Tick]:
        columns = (
            TextColumn("  {task.description:<44}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.advance(task, done)
            progress.update(task, completed=total)

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", markup=False, highlight=False)
