"""Results that show their main figures when they are printed, and as a table in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from html import escape


class Summary(ABC):
    """A result with a few rows that say what it is."""

    @abstractmethod
    def summary_rows(self) -> list[tuple[str, str]]:
        """Return (name, value) of the main figures, the verdict first."""

    def __repr__(self) -> str:
        rows = self.summary_rows()
        width = max(len(name) for name, _value in rows)
        return "\n".join([f"{type(self).__name__}", *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _repr_html_(self) -> str:
        """What IPython shows: every value is text, so nothing of it is run."""
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in self.summary_rows()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
