"""What the commands on an artifact found, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from compile_steer.chain import Link
from compile_steer.reproduce import Reproduction

_STATES = {
    "whole": "[green]whole[/green]",
    "broken": "[red]BROKEN[/red]",
    "absent": "[yellow]not here[/yellow]",
    "unrecorded": "[yellow]not recorded[/yellow]",
}


def print_chain(console: Console, links: Sequence[Link]) -> None:
    """Every link back to the data; of a broken one what was expected and what was found."""
    console.print("[bold]Chain[/bold]")
    for link in links:
        console.print(f"  {link.what:<28} {_STATES[link.state]}  {escape(link.where)}", soft_wrap=True)
        if link.state == "broken":
            console.print(f"  {'':<28} expected {escape(link.expected) or 'no such file'}", soft_wrap=True)
            console.print(f"  {'':<28} found    {escape(link.found) or 'nothing'}", soft_wrap=True)
    broken = [link.what for link in links if link.state == "broken"]
    if broken:
        console.print(
            f"[red]Broken:[/red] {', '.join(dict.fromkeys(broken))}. Make it again, or put back what was there."
        )


def print_reproduction(console: Console, found: Reproduction) -> None:
    """Every link that was made again, and the versions that are others than then."""
    said = {
        "bytes": "[green]bytes agree[/green]",
        "numbers": "[green]numbers agree[/green]",
        "differs": "[red]DIFFERS[/red]",
        "absent": "[yellow]not compared[/yellow]",
    }
    console.print(f"[bold]Made again[/bold], numbers agreeing up to a relative difference of {found.tolerance:g}")
    for link in found.links:
        size = "" if link.difference is None else f"  largest relative difference {link.difference:.2g}"
        note = f"  ({escape(link.note)})" if link.note else ""
        console.print(f"  {link.what:<28} {said[link.state]}{size}{note}", soft_wrap=True)
    for name, (then, now) in found.versions.items():
        console.print(f"  [yellow]{name} {then} made it; this is {now or 'none'}[/yellow]")
