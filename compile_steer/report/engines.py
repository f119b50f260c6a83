"""What serving engines load and compute, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from compile_steer.tools.serving.export import Shipped
from compile_steer.tools.serving.record import Reading


def print_shipped(console: Console, found: Shipped) -> None:
    """What was written, what was changed on the way, and how to load it."""
    console.print(f"{found.kind} for {found.engine}: {', '.join(found.files)} in {found.folder}", markup=False)
    for note in found.notes:
        console.print(f"  {note}", markup=False)
    console.print("Load it:")
    for line in found.load:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def print_readings(console: Console, found: Sequence[Reading]) -> None:
    """A row for every engine; below it why there is none."""
    table = Table(title="log p(token) in each engine less transformers', nats", title_justify="left")
    for name in ("engine", "form", "largest", "rms", "base: largest", "rms", "steering's effect", "dose", ""):
        table.add_column(name, justify="left" if name in ("engine", "form", "") else "right")
    for one in found:
        numbers = (
            f"{one.error:.1e}",
            f"{one.rms:.1e}",
            f"{one.base_error:.1e}",
            f"{one.base_rms:.1e}",
            f"{one.effect:.2f}",
            f"{one.dose:.4f}",
        )
        verdict = "[green]same[/green]" if one.passed else "[red]OTHER[/red]"
        table.add_row(
            one.engine,
            one.form,
            *(("",) * 6 if one.problem else numbers),
            "[red]none[/red]" if one.problem else verdict,
        )
    console.print(table)
    for one in found:
        if one.problem:
            console.print(f"  {one.engine}: {one.problem}", markup=False, soft_wrap=True)
        elif not one.passed and abs(one.dose) < 0.1:
            console.print(f"  {one.engine} serves the base: the file was loaded without effect.", markup=False)
