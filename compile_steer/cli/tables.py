"""What the tools found, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # the tools import torch and more, which `show` of a folder does not need
    from rich.console import Console

    from compile_steer.artifacts.provenance import EngineRecord
    from compile_steer.steering.program import Program
    from compile_steer.tools.audit import Audit, BakedDirection
    from compile_steer.tools.decompile import Decompiled
    from compile_steer.tools.interference import Composition
    from compile_steer.tools.lineage import Link
    from compile_steer.tools.push import Upload
    from compile_steer.tools.reproduce import Reproduction
    from compile_steer.tools.serving.export import Exported
    from compile_steer.tools.task_vector import TaskVector

_STATES = {
    "intact": "[green]intact[/green]",
    "changed": "[red]CHANGED[/red]",
    "missing": "[yellow]missing[/yellow]",
    "unrecorded": "[yellow]unrecorded[/yellow]",
}


def print_lineage(console: Console, links: Sequence[Link]) -> None:
    """Every link back to the data; of a changed one what was expected and what is there."""
    if links:
        console.print("[bold]Lineage[/bold]")
    for link in links:
        console.print(f"  {link.name:<28} {_STATES[link.state]}  {escape(link.path)}", soft_wrap=True)
        if link.state == "changed":
            console.print(f"  {'':<28} expected {escape(link.expected) or 'no such file'}", soft_wrap=True)
            console.print(f"  {'':<28} actual   {escape(link.actual) or 'nothing'}", soft_wrap=True)
    changed = [link.name for link in links if link.state == "changed"]
    if changed:
        console.print(
            f"[red]Changed:[/red] {', '.join(dict.fromkeys(changed))}. Make it again, or put back what was there."
        )


def print_reproduction(console: Console, found: Reproduction) -> None:
    """Every link that was made again, and the versions that are others than then."""
    said = {
        "bytes": "[green]bytes agree[/green]",
        "numbers": "[green]numbers agree[/green]",
        "differs": "[red]DIFFERS[/red]",
        "not compared": "[yellow]not compared[/yellow]",
    }
    console.print(f"[bold]Made again[/bold], numbers agreeing up to a relative difference of {found.tolerance:g}")
    for link in found.links:
        size = "" if link.difference is None else f"  largest relative difference {link.difference:.2g}"
        note = f"  ({escape(link.note)})" if link.note else ""
        console.print(f"  {link.name:<28} {said[link.state]}{size}{note}", soft_wrap=True)
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


def _baked(one: BakedDirection) -> str:
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


def print_export(console: Console, found: Exported) -> None:
    """What was written, what was changed on the way, and how to load it."""
    console.print(f"{found.kind} for {found.engine}: {', '.join(found.files)} in {found.folder}", markup=False)
    for note in found.notes:
        console.print(f"  {note}", markup=False)
    console.print("Load it:")
    for line in found.load:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def print_engine_records(console: Console, found: Sequence[EngineRecord]) -> None:
    """A row for every engine; below it why there is none."""
    table = Table(title="log p(token) in each engine less transformers', nats", title_justify="left")
    for name in ("engine", "form", "largest", "rms", "base: largest", "rms", "steering's effect", "gain", ""):
        table.add_column(name, justify="left" if name in ("engine", "form", "") else "right")
    for one in found:
        numbers = (
            f"{one.error:.1e}",
            f"{one.rms:.1e}",
            f"{one.base_error:.1e}",
            f"{one.base_rms:.1e}",
            f"{one.effect:.2f}",
            f"{one.gain:.4f}",
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
        elif not one.passed and abs(one.gain) < 0.1:
            console.print(f"  {one.engine} serves the base: the file was loaded without effect.", markup=False)


def print_decompiled(console: Console, found: Decompiled, known: Program | None) -> None:
    """The blocks that were changed, beside the program that is known, if any."""
    from torch.nn.functional import cosine_similarity

    table = Table(title="What the artifact's blocks were changed to do", title_justify="left")
    for heading in ("block", "constant, norm", "change over stream", "explained", "cosine with the known vector"):
        table.add_column(heading, justify="right")
    wanted = {i.site.layer: i.vector for i in known.active if i.site.point == "resid_post"} if known else {}
    for block, one in zip(found.blocks, found.program.interventions, strict=True):
        beside = wanted.get(block.layer)
        same = "" if beside is None else f"{float(cosine_similarity(one.vector, beside, dim=0)):.4f}"
        table.add_row(
            str(block.layer), f"{block.norm:.3g}", f"{block.relative_size:.2%}", f"{block.explained:.1%}", same
        )
    console.print(table)
    console.print(
        f"Adding these constants explains {found.explained:.1%} of KL(artifact||base) on neutral text "
        f"({found.kl_base:.3g} nats a token, {found.kl_left:.3g} left)."
    )


def print_composition(console: Console, found: Composition) -> None:
    """The interference matrix, every artifact, each scale, and how much of the error is the compile's."""
    from compile_steer.tools.interference import CO_LOADED

    pairs = ", ".join(f"{row.n_pairs} of {row.behaviour}" for row in found.matrix)
    table = Table(
        title=f"What each changes: log p(positive) - log p(negative), nats/token ({pairs})", title_justify="left"
    )
    table.add_column("switched on")
    for row in found.matrix:
        table.add_column(f"on {row.behaviour} [95 %]", justify="right")
    for label in found.matrix[0].effects:
        table.add_row(label, *(f"{row.effects[label]}" for row in found.matrix))
    for kind in found.matrix[0].cross:
        table.add_row(f"{kind}: all minus the sum", *(f"{row.cross[kind]}" for row in found.matrix), style="dim")
    for name in found.matrix[0].errors:
        table.add_row(f"{name} minus hooks", *(f"{row.errors[name]}" for row in found.matrix), style="dim")
    console.print(table)
    title = f"Adapters against hooks, {found.n_tokens} held-out response tokens written under all hooks"
    scales = Table(title=title, title_justify="left")
    for heading in (
        "adapters",
        f"scales of {', '.join(found.names)}",
        "KL",
        "KL(hooks||base)",
        "remaining KL",
        "top-1",
    ):
        scales.add_column(heading, justify="left" if heading == "adapters" else "right")
    composed = [(way, fit) for way, fit in found.artifacts.items() if way != CO_LOADED]
    for name, fit in [*composed, *((CO_LOADED, fit) for fit in found.settings)]:
        remaining = "-" if fit.kl_remaining is None else f"{fit.kl_remaining:.2%}"
        setting = ", ".join(f"{scale:g}" for scale in fit.scales)
        scales.add_row(name, setting, f"{fit.kl:.1e}", f"{fit.kl_base:.3f}", remaining, f"{fit.top1:.2%}")
    console.print(scales)
    i = found.states
    errors = "; ".join(f"{way} {error:.3f}" for way, error in i.errors.items())
    console.print(
        f"  final states, relative to what the programs change one by one: the programs' own interference {i.programs:.3f}; "
        f"errors: adapters alone, summed {i.alone:.3f}; {errors}; of the co-loaded ones only when together {i.cross:.3f}"
    )
    if found.stacked_from_loaded is not None:
        console.print(f"  KL(co-loaded||stacked) = {found.stacked_from_loaded:.1e} nats/token")
    for reason in found.reasons:
        console.print(f"  [red]FAILED[/red] {escape(reason)}")


def print_task_vector(console: Console, found: TaskVector) -> None:
    """The matrices of a task vector, and where it lies."""
    table = Table(title="What the task vector changes", title_justify="left")
    for heading in ("matrix", "norm", "stable rank", "rank of 99 %", "cosine with the vector"):
        table.add_column(heading, justify="left" if heading == "matrix" else "right")
    for one in found.matrices:
        cosine = "" if one.cosine is None else f"{one.cosine:.3f}"
        table.add_row(one.name, f"{one.norm:.3g}", f"{one.stable_rank:.2f}", str(one.rank_99), cosine)
    if found.matrices:
        console.print(table)
    console.print(f"Written as {found.form}: {found.folder}", soft_wrap=True)
