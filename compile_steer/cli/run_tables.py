"""Tables about runs: what became of many recipes, and where the time of one went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from compile_steer.cli.tables import new_table

if TYPE_CHECKING:
    from rich.console import Console

    from compile_steer.common.profile import Phase
    from compile_steer.tools.fleet import Fleet

_STATES = {"passed": "green", "failed": "red", "error": "red", "": ""}


def print_fleet(console: Console, fleet: Fleet) -> None:
    """Print a row for each recipe; what went wrong follows below, where there is room for it."""
    table = new_table(
        f"{len(fleet.rows)} recipes, {fleet.workers} workers ({fleet.engine}), {fleet.seconds:.0f} s",
        ("recipe", "model", "state", "verdict", "ship"),
        ("seconds", "workers lost"),
    )
    for row in fleet.rows:
        state = Text(f"{row.state} in {row.stage}" if row.state == "error" else row.state, style=_STATES[row.state])
        table.add_row(
            row.name, row.model, state, row.verdict, row.ship or "none", f"{row.seconds:.0f}", str(row.lost_workers)
        )
    console.print(table)
    for row in fleet.rows:
        for line in row.problems or ([row.headline] if row.state == "failed" else []):
            console.print(f"  {row.name}: {line}", soft_wrap=True, highlight=False)


def print_profile(console: Console, phases: Sequence[Phase], rate: float, path: Path) -> None:
    """Print a row for each phase, the longest first; `rate` is that of a large matrix product here, FLOP/s."""
    table = new_table(
        f"where the time went; a large matrix product runs at {rate / 1e9:,.0f} GFLOP/s here",
        ("phase",),
        ("seconds", "tokens/s", "GFLOP/s", "of that rate", "peak memory, GiB"),
    )
    for phase in phases:
        speed = phase.flops / phase.seconds if phase.seconds else 0.0
        tokens = f"{phase.tokens / phase.seconds:,.0f}" if phase.tokens else ""
        figures = (f"{speed / 1e9:,.1f}", f"{speed / rate:.0%}") if phase.flops else ("", "")
        table.add_row(phase.label, f"{phase.seconds:,.1f}", tokens, *figures, f"{phase.peak_bytes / 2**30:.2f}")
    console.print(table)
    console.print(f"  {path} holds the trace, for ui.perfetto.dev", soft_wrap=True, highlight=False)
