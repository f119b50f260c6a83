"""What the tools found, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from compile_steer.common.errors import brief
from compile_steer.steering.sites import OPERATIONS

if TYPE_CHECKING:  # the tools import torch and more, which `show` of a folder does not need
    from rich.console import Console

    from compile_steer.artifacts.provenance import EngineRecord
    from compile_steer.steering.program import Program
    from compile_steer.tools.audit import Audit, BakedDirection
    from compile_steer.tools.decompile import Decompiled
    from compile_steer.tools.inspect_model import Inspection
    from compile_steer.tools.interference import Composition
    from compile_steer.tools.push import Upload
    from compile_steer.tools.report_links import Link
    from compile_steer.tools.reproduce import Reproduction
    from compile_steer.tools.serving.export import Exported
    from compile_steer.tools.task_vector import TaskVector

_LINKS = {"intact": "green", "changed": "red", "missing": "yellow", "unrecorded": "yellow"}
_REPRODUCED = {"bytes": "green", "numbers": "green", "differs": "red", "not compared": "yellow"}


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with its text columns, then its columns of numbers."""
    table = Table(title=title, title_justify="left")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_summary(console: Console, rows: Sequence[tuple[str, str]], links: Sequence[Link]) -> None:
    """Print what an artifact is in a line each, how many links back to its data hold, and every one that does not."""
    # Of those that do not hold the names, each once: a lineage may come to one file twice.
    names = {state: list(dict.fromkeys(link.name for link in links if link.state == state)) for state in _LINKS}
    counts = [f"{sum(link.state == 'intact' for link in links)} links back to the data are intact"]
    counts += [f"{state}: {', '.join(names[state])}" for state in ("missing", "unrecorded") if names[state]]
    for name, text in [*rows, ("lineage", "; ".join(counts))]:
        console.print(Text.assemble((f"{name:<10}", "bold"), text), soft_wrap=True)
    changed = [link for link in links if link.state == "changed"]
    if changed:
        print_lineage(console, changed)


def print_lineage(console: Console, links: Sequence[Link]) -> None:
    """Print every link back to the data; of a changed one what was expected and what is there."""
    if links:
        console.print("Lineage", style="bold")
    for link in links:
        state = (link.state, _LINKS[link.state])
        console.print(Text.assemble(f"  {link.name:<28} ", state, f"  {link.path}"), soft_wrap=True)
        if link.state == "changed":
            console.print(f"  {'':<28} expected {link.expected or 'no such file'}", soft_wrap=True)
            console.print(f"  {'':<28} actual   {link.actual or 'nothing'}", soft_wrap=True)
    changed = dict.fromkeys(link.name for link in links if link.state == "changed")
    if changed:
        advice = f" {', '.join(changed)}. Make it again, or put back what was there."
        console.print(Text.assemble(("Changed:", "red"), advice))


def print_reproduction(console: Console, reproduction: Reproduction) -> None:
    """Print every link that was made again, and the versions that have changed since."""
    tolerance = reproduction.tolerance
    title = f", numbers agree up to a relative difference of {tolerance:g}"
    console.print(Text.assemble(("Made again", "bold"), title))
    for link in reproduction.links:
        agree = " agree" if link.state in ("bytes", "numbers") else ""
        size = "" if link.difference is None else f"  largest relative difference {link.difference:.2g}"
        note = f"  ({link.note})" if link.note else ""
        state = (f"{link.state}{agree}", _REPRODUCED[link.state])
        console.print(Text.assemble(f"  {link.name:<28} ", state, f"{size}{note}"), soft_wrap=True)
    for name, (then, now) in reproduction.versions.items():
        console.print(f"  {name} {then} made it; this is {now or 'none'}", style="yellow")


def print_audit(console: Console, audit: Audit) -> None:
    """Print the tensors that changed, the settings that changed, and the direction that explains it, if one does."""
    recast = "".join(f", {count} only cast from {kind}" for kind, count in audit.recast.items())
    counts = f"{audit.n_tensors} tensors, {audit.n_same} the same{recast}, {len(audit.changes)} changed"
    pair = Text.assemble((f"{audit.kind} {audit.other}", "bold"), f" against {audit.base}: {counts}")
    console.print(pair, soft_wrap=True)
    zero = [change for change in audit.changes if change.norm == 0.0]  # biases that a config flag brings along
    if zero:
        console.print(f"  {len(zero)} of these are new and all zero, as {zero[0].name}")
    if len(zero) < len(audit.changes):
        title = f"rank: singular values above {audit.threshold:g} of the largest, and above rounding"
        numbers = ("norm", "over the base's", "rank", "top holds", "cosine")
        table = new_table(title, ("tensor", "", "type"), numbers)
        for change in audit.changes:
            if change.norm > 0.0:
                table.add_row(
                    change.name,
                    change.kind,
                    change.dtype,
                    f"{change.norm:.3g}",
                    _or_blank(change.relative, ".2%"),
                    _or_blank(change.rank, "d"),
                    _or_blank(change.top, ".2%"),
                    _or_blank(change.cosine, ".3f"),
                )
        console.print(table)
    for setting in audit.settings:
        name = f"{setting.file} {setting.key}".rstrip()
        values = f"{brief(setting.base)} -> {brief(setting.other)}"
        console.print(f"  {name}: {values}", soft_wrap=True)
    for baked in audit.baked:
        console.print(Text.assemble("  ", ("A baked direction", "bold"), f": {_describe(baked)}"), soft_wrap=True)
    if not audit.baked:
        console.print(f"  No baked direction: {audit.not_baked}", soft_wrap=True)


def _describe(baked: BakedDirection) -> str:
    where = "" if baked.block is None else f" of block {baked.block}"
    part = "" if baked.coefficient is None else f", {baked.coefficient:.0%} of it"
    description = {
        "added": f"a constant of norm {baked.norm:.4g} added by {baked.tensors[0]}{where}",
        "ablated": f"one direction removed from what {len(baked.tensors)} matrices write{part}",
        "written": f"{baked.tensors[0]}{where} writes along one, a rank-1 change of norm {baked.norm:.4g}",
    }[baked.kind]
    return description + ("" if baked.cosine is None else f"; cosine with the known vector {baked.cosine:+.4f}")


def print_upload(console: Console, upload: Upload, sent: str | None, force: bool) -> None:
    """Print every file that is or would be sent, why it should not be, and what became of it."""
    kind = "private" if upload.private else "PUBLIC"
    title = Text.assemble((str(upload.folder), "bold"), f" to {upload.target} ({kind} if it is new)")
    console.print(title, soft_wrap=True)
    for file in upload.files:
        console.print(f"  {file.name:<40} {file.size:>13,} bytes  {file.sha256}", soft_wrap=True)
    for note in upload.notes:
        console.print(Text.assemble("  ", ("note", "yellow"), f": {note}"), soft_wrap=True)
    for refusal in upload.refusals:
        state = ("sent in spite of" if sent else "refused", "red")
        console.print(Text.assemble("  ", state, f": {refusal}"), soft_wrap=True)
    if sent is not None:
        console.print(f"Sent: {sent}", soft_wrap=True)
    elif upload.refusals and not force:
        console.print("Nothing was sent. Verify it first, or send it as it is with --force.")
    else:
        console.print("Nothing was sent. Add --yes to send exactly these files.")


def print_export(console: Console, exported: Exported) -> None:
    """Print what was written, what was changed on the way, and how to load it."""
    files = ", ".join(exported.files)
    lines = [f"{exported.kind} for {exported.engine}: {files} in {exported.folder}"]
    lines += [*(f"  {note}" for note in exported.notes), "Load it:", *(f"  {line}" for line in exported.load)]
    console.print("\n".join(lines), soft_wrap=True)


def print_engine_records(console: Console, records: Sequence[EngineRecord]) -> None:
    """Print a row for every engine, and below it why there is none."""
    title = "log p(token) in each engine minus transformers', nats"
    numbers = ("largest", "rms", "base: largest", "rms", "steering's effect", "gain", "")
    table = new_table(title, ("engine", "form"), numbers)
    for record in records:
        sizes = (record.error, record.rms, record.base_error, record.base_rms)
        cells = [*(f"{size:.1e}" for size in sizes), f"{record.effect:.2f}", f"{record.gain:.4f}"]
        verdict = Text("none" if record.problem else "same" if record.passed else "OTHER")
        verdict.stylize("green" if record.passed and not record.problem else "red")
        table.add_row(record.engine, record.form, *([""] * len(cells) if record.problem else cells), verdict)
    console.print(table)
    for record in records:
        if record.problem:
            console.print(f"  {record.engine}: {record.problem}", soft_wrap=True)
        elif not record.passed and abs(record.gain) < 0.1:
            console.print(f"  {record.engine} serves the base: the file was loaded without effect.")


def print_decompiled(console: Console, decompiled: Decompiled, known: Program | None) -> None:
    """Print the blocks that were changed, beside the program that is known, if any."""
    from torch.nn.functional import cosine_similarity

    numbers = ("block", "constant, norm", "change over stream", "explained", "cosine with the known vector")
    table = new_table("What the artifact's blocks were changed to do", (), numbers)
    vectors = {i.site.layer: i.vector for i in known.active if i.site.point == "resid_post"} if known else {}
    for block, intervention in zip(decompiled.blocks, decompiled.program.interventions, strict=True):
        vector = vectors.get(block.layer)
        cosine = None if vector is None else float(cosine_similarity(intervention.vector, vector, dim=0))
        size, explained = f"{block.relative_size:.2%}", f"{block.explained:.1%}"
        table.add_row(str(block.layer), f"{block.norm:.3g}", size, explained, _or_blank(cosine, ".4f"))
    console.print(table)
    console.print(
        f"Adding these constants explains {decompiled.explained:.1%} of KL(artifact||base) on control text "
        f"({decompiled.kl_base:.3g} nats per token, {decompiled.kl_left:.3g} left)."
    )


def print_composition(console: Console, composition: Composition) -> None:
    """Print the interference matrix, every artifact, each scale, and how much of the error is the compile's."""
    from compile_steer.tools.interference import CO_LOADED

    rows = composition.matrix
    pairs = ", ".join(f"{row.n_pairs} of {row.behaviour}" for row in rows)
    title = f"What each changes: log p(positive) - log p(negative), nats/token ({pairs})"
    table = new_table(title, ("switched on",), [f"on {row.behaviour} [95 %]" for row in rows])
    for label in rows[0].effects:
        table.add_row(label, *(str(row.effects[label]) for row in rows))
    for kind in rows[0].cross:
        table.add_row(f"{kind}: all minus the sum", *(str(row.cross[kind]) for row in rows), style="dim")
    for name in rows[0].errors:
        table.add_row(f"{name} minus hooks", *(str(row.errors[name]) for row in rows), style="dim")
    console.print(table)
    title = f"Adapters against hooks, {composition.n_tokens} held-out response tokens written under all hooks"
    numbers = (f"scales of {', '.join(composition.names)}", "KL", "KL(hooks||base)", "remaining KL", "top-1")
    table = new_table(title, ("adapters",), numbers)
    composed = [(name, fit) for name, fit in composition.artifacts.items() if name != CO_LOADED]
    for name, fit in [*composed, *((CO_LOADED, fit) for fit in composition.settings)]:
        scales = ", ".join(f"{scale:g}" for scale in fit.scales)
        remaining = _or_blank(fit.kl_remaining, ".2%") or "-"
        table.add_row(name, scales, f"{fit.kl:.1e}", f"{fit.kl_base:.3f}", remaining, f"{fit.top1:.2%}")
    console.print(table)
    states = composition.states
    errors = "; ".join(f"{name} {error:.3f}" for name, error in states.errors.items())
    console.print(
        f"  final states, relative to what the programs change one by one: the programs' own interference "
        f"{states.programs:.3f}; errors: adapters alone, summed {states.alone:.3f}; {errors}; of the co-loaded ones only "
        f"when together {states.cross:.3f}"
    )
    if composition.stacked_from_loaded is not None:
        console.print(f"  KL(co-loaded||stacked) = {composition.stacked_from_loaded:.1e} nats/token")
    for reason in composition.reasons:
        console.print(Text.assemble("  ", ("FAILED", "red"), f" {reason}"))


def print_task_vector(console: Console, task_vector: TaskVector) -> None:
    """Print the matrices of a task vector, and where it lies."""
    numbers = ("norm", "stable rank", "rank of 99 %", "cosine with the vector")
    table = new_table("What the task vector changes", ("matrix",), numbers)
    for matrix in task_vector.matrices:
        sizes = (f"{matrix.norm:.3g}", f"{matrix.stable_rank:.2f}", str(matrix.rank_99))
        table.add_row(matrix.name, *sizes, _or_blank(matrix.cosine, ".3f"))
    if task_vector.matrices:
        console.print(table)
    console.print(f"Written as {task_vector.form}: {task_vector.folder}", soft_wrap=True)
    if task_vector.remark:
        console.print(f"Of the artifact that was scaled its report says: {task_vector.remark}.", soft_wrap=True)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """Print a row for every point of every kind of block, what compiles exactly there, and why the rest does not."""
    from compile_steer.tools.inspect_model import bias_text, ranges

    head = "tied to the head" if inspection.tied else "the head has its own"
    title = (
        f"{inspection.architecture}: {inspection.n_layers} blocks {inspection.blocks}, width {inspection.d_model}, "
        f"embeddings {', '.join(inspection.embeddings) or 'not found'} ({head})"
    )
    columns = ("blocks", "point", "module", "written by", "times", "bias", *(f"{name} by" for name in OPERATIONS))
    table = new_table(title, columns, ())
    reasons: dict[str, str] = {}
    for kind in inspection.kinds:
        for row in kind.points:
            if row.exact is None:
                table.add_row(ranges(kind.layers), row.point, "not there")
                reasons[f"{row.point} of blocks {ranges(kind.layers)}"] = row.missing or ""
                continue
            exact = {operation: found.backend or "fit" for operation, found in row.exact.items()}
            writer = "itself" if row.module and row.projection == row.module else row.projection or "-"
            writer += ", then that norm" if row.norm else ""
            names = (row.module or kind.kind, writer, f"{row.multiplier:.4g}")
            bias = "-" if row.point == "resid_post" else bias_text(row.bias)
            table.add_row(ranges(kind.layers), row.point, *names, bias, *exact.values())
            if row.exact["add"].backend is None:
                place = f"add at {row.point} of blocks {ranges(kind.layers)}"
                reasons[place] = row.exact["add"].refusals["bias"]
    console.print(table)
    everywhere = inspection.everywhere
    how = everywhere.backend or f"by fit: {everywhere.refusals['orthogonalise']}"
    console.print(f"Ablation at the embeddings and all projections: {how}", soft_wrap=True)
    console.print(f"By fit, at any of these points and any positions: {', '.join(inspection.fitted)}", soft_wrap=True)
    for place, reason in reasons.items():
        console.print(f"  {place}: {reason}", soft_wrap=True)
