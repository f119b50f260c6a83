"""The console: where text from outside reaches a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from compile_steer.common.errors import plain

_WIDTH = 132  # of lines that no terminal limits


class Terminal(Console):
    """A console on which text is text: no markup, no emoji codes, no control codes. Styles are given as `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        if self._width is None and not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _WIDTH

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Every text passes through here, whatever table, progress bar or line it is part of."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
