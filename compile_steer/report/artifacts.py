"""What the commands on an artifact found, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compile_steer.tools.audit import Audit
from compile_steer.tools.audit_baked import Baked
from compile_steer.tools.lineage import Link
from compile_steer.tools.push import Upload
from compile_steer.tools.reproduce import Reproduction

_STATES = {
    "whole": "[green]whole[/green]",
    "broken": "[red]BROKEN[/red]",
    "absent": "[yellow]not here[/yellow]",
    "unrecorded": "[yellow]not recorded[/yellow]",
}


def print_chain(console: Console, links: Sequence[Link]) -> None:
    """Every link back to the data; of a broken one what was expected and what was found."""
    if links:
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


def print_audit(console: Console, found: Audit) -> None:
    """The tensors that changed, the settings that changed, and the direction that explains it, if one does."""
    recast = "".join(f", {count} only cast from {kind}" for kind, count in found.recast.items())
    console.print(
        f"[bold]{found.kind} {escape(found.other)}[/bold] against {escape(found.base)}: {found.n_tensors} tensors, "
        f"{found.n_same} the same{recast}, {len(found.changes)} changed",
        soft_wrap=True,
    )
    zero = [one for one in found.changes if one.norm == 0.0]
    if zero:
        console.print(f"  {len(zero)} of these are new and all zero, as {escape(zero[0].name)}")
    if len(zero) < len(found.changes):
        title = f"rank: singular values above {found.threshold:g} of the largest, and above rounding"
        table = Table(title=title, title_justify="left")
        for heading in ("tensor", "", "type"):
            table.add_column(heading, overflow="fold")
        for heading in ("norm", "over the base's", "rank", "top holds", "cosine"):
            table.add_column(heading, justify="right")
        for one in found.changes:
            shares = ("" if share is None else f"{share:.2%}" for share in (one.relative, one.top))
            relative, top = shares
            rank, cosine = "" if one.rank is None else str(one.rank), "" if one.cosine is None else f"{one.cosine:.3f}"
            if one.norm > 0.0:
                table.add_row(escape(one.name), one.kind, one.dtype, f"{one.norm:.3g}", relative, rank, top, cosine)
        console.print(table)
    for setting in found.settings:
        name = f"{setting.file} {setting.key}".rstrip()
        console.print(
            f"  {escape(name)}: {escape(repr(setting.base))} -> {escape(repr(setting.other))}", soft_wrap=True
        )
    for baked in found.baked:
        console.print(f"  [bold]A baked direction[/bold]: {_baked(baked)}", soft_wrap=True)
    if not found.baked:
        console.print(f"  No baked direction: {escape(found.not_baked)}", soft_wrap=True)


def _baked(one: Baked) -> str:
    where = "" if one.block is None else f" of block {one.block}"
    known = "" if one.cosine is None else f"; cosine with the known vector {one.cosine:+.4f}"
    what = {
        "added": f"a constant of norm {one.norm:.4g} added by {one.tensors[0]}{where}",
        "ablated": f"one direction taken out of what {len(one.tensors)} matrices write"
        + ("" if one.coefficient is None else f", {one.coefficient:.0%} of it"),
        "written": f"{one.tensors[0]}{where} writes along one, a rank-1 change of norm {one.norm:.4g}",
    }[one.kind]
    return f"{escape(what)}{known}"


def print_upload(console: Console, upload: Upload, sent: str | None, force: bool) -> None:
    """Every file that is or would be sent, why it should not be, and what became of it."""
    kind = "private" if upload.private else "PUBLIC"
    console.print(
        f"[bold]{escape(str(upload.folder))}[/bold] to {escape(upload.target)} ({kind} if it is new)", soft_wrap=True
    )
    for file in upload.files:
        console.print(f"  {escape(file.name):<40} {file.size:>13,} bytes  {file.sha256}", soft_wrap=True)
    for note in upload.notes:
        console.print(f"  [yellow]note[/yellow]: {escape(note)}", soft_wrap=True)
    for refusal in upload.refusals:
        console.print(f"  [red]{'sent in spite of' if sent else 'refused'}[/red]: {escape(refusal)}", soft_wrap=True)
    if sent is not None:
        console.print(f"Sent: {escape(sent)}", soft_wrap=True)
    elif upload.refusals and not force:
        console.print("Nothing was sent. Verify it first, or send it as it is with --force.")
    else:
        console.print("Nothing was sent. Add --yes to send exactly these files.")
