"""The run's findings as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compile_steer.extract.generate_pairs import GenerationReport
from compile_steer.lower.plan import Choice
from compile_steer.validate.report import ValidationReport, block_name
from compile_steer.verify.parity import Parity

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def print_validation(console: Console, report: ValidationReport) -> None:
    """The sweep and the verdict with its reasons."""
    table = Table(title="Sweep on validation data", title_justify="left")
    for heading in ("layer", "coefficient", "margin, nats/token", "perplexity", "score", "repetition"):
        table.add_column(heading, justify="right")
    for point in report.grid:
        chosen = (point.layer, point.coefficient) == (report.layer, report.coefficient)
        table.add_row(
            block_name(point.layer),
            f"{point.coefficient:.3g}",
            "skipped" if point.margin is None else f"{point.margin:+.3f}",
            "" if point.perplexity_ratio is None else f"x{point.perplexity_ratio:.2f}",
            "" if point.score is None else f"{point.score:.2f}",
            "" if point.repetition is None else f"{point.repetition:.2f}",
            style="bold green" if chosen else "",
        )
    console.print(table)
    colour = _COLOURS[report.verdict]
    console.print(f"[bold]Verdict on test data: [{colour}]{report.verdict.upper()}[/{colour}][/bold]")
    for reason in report.reasons:
        console.print(f"  - {escape(reason)}")
    for note in report.notes:
        console.print(f"  {escape(note)}")
    s = report.separability
    console.print(
        f"  held-out pairs told apart with AUROC {s.auroc:.2f}, d' {s.d_prime:.1f}; steerability "
        f"{report.steerability:+.3f} nats/token per unit of coefficient, {report.wrong_way:.0%} of pairs the wrong way; "
        f"strength {report.coherence.strength:.2f} of the stream's norm"
    )


def print_generation(console: Console, report: GenerationReport, folder: Path) -> None:
    """Print what was generated and kept, a line for each split."""
    for name, split in report.splits.items():
        console.print(f"{name}: {escape(split.describe())}; {split.generated} responses generated")
    console.print(f"Pairs: {folder}")


def print_plan(console: Console, program: str, choices: Sequence[Choice]) -> None:
    """Every backend with why it runs or does not, and the forms it cannot ship."""
    console.print(f"[bold]Plan[/bold] for {escape(program)}")
    for choice in choices:
        if choice.refusal is not None:
            console.print(f"  {choice.backend:<14} [red]refused[/red]: {escape(choice.refusal)}")
            continue
        state = "[green]chosen[/green]" if choice.chosen else "legal, not asked for"
        console.print(f"  {choice.backend:<14} {state}")
        if choice.adapter_refusal is not None:
            console.print(f"  {'':<14} as adapter [red]refused[/red]: {escape(choice.adapter_refusal)}")


def print_parities(console: Console, parities: Sequence[Parity]) -> None:
    """The table of every compiled artifact, and the reasons of those that failed."""
    if not parities:
        return
    first = parities[0]
    table = Table(
        title=f"Compiled against steered, {first.n_tokens} held-out response tokens "
        f"(KL(steered||base) = {first.kl_base:.3f} nats/token, base top-1 {first.top1_base:.1%})",
        title_justify="left",
    )
    for heading in ("artifact", "KL", "share [95 %]", "top-1", "recovery [95 %]", "score", "drift", "seconds", ""):
        table.add_column(heading, justify="left" if heading in ("artifact", "") else "right")
    for p in parities:
        share = f"{p.kl_share:.3%} [{100 * p.kl_share_low:.3f}, {100 * p.kl_share_high:.3f}]"
        recovery = "-" if p.recovery is None else f"{p.recovery:.3f} [{p.recovery_low:.3f}, {p.recovery_high:.3f}]"
        table.add_row(
            f"{p.backend} {p.form}",
            f"{p.kl_per_token:.1e}",
            share,
            f"{p.top1_agreement:.2%}",
            recovery,
            f"{p.score_compiled:.2f}",
            f"{p.neutral_drift_compiled:.3f}",
            f"{p.compile_seconds:.1f}",
            "[green]passed[/green]" if p.passed else "[red]FAILED[/red]",
        )
    console.print(table)
    console.print(
        f"  score: base {first.score_base:.2f}, steered {first.score_steered:.2f}; "
        f"drift on neutral text: steered {first.neutral_drift_steered:.3f} nats/token; seconds: of lowering alone"
    )
    _print_kinds(console, parities)
    for remark in first.remarks:
        console.print(f"  {escape(remark)}")
    for p in parities:
        _print_details(console, p)


def _print_kinds(console: Console, parities: Sequence[Parity]) -> None:
    """How far each goes the steered model's way by itself, on every kind of prompt."""
    title = (
        "Answered freely, greedy, sampled: tokens as steered before the first other one (share of KL on sampled ones)"
    )
    if parities[0].score_by_kind is not None:
        title += "; score"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for kind in parities[0].kinds:
        table.add_column(f"{kind.kind}, {kind.prompt_tokens:,} tokens", justify="right")
    frees = [(k.greedy, k.sampled) for k in parities[0].kinds]
    table.add_row(
        "base", *(f"{g.same_base:.0%}, {s.same_base:.0%}{_two(g.score_base, s.score_base)}" for g, s in frees)
    )
    if parities[0].score_by_kind is not None:
        table.add_row("steered", *(f"-{_two(g.score_steered, s.score_steered)}" for g, s in frees))
    for p in parities:
        table.add_row(f"{p.backend} {p.form}", *(f"{k}{_two(k.greedy.score, k.sampled.score)}" for k in p.kinds))
    console.print(table)


def _two(greedy: float | None, sampled: float | None) -> str:
    """Both scores, to stand behind something else; nothing where there are none."""
    return "" if greedy is None or sampled is None else f"; {greedy:.2f}, {sampled:.2f}"


def _print_details(console: Console, p: Parity) -> None:
    """An adapter's controls and dial, the tests of equivalence, and why it failed."""
    if (c := p.controls) is not None:
        other = "" if c.other_behaviour is None else f"; another behaviour's pairs {c.other_behaviour:+.3f}"
        console.print(
            f"  {p.backend} adapter on {c.n_pairs} test pairs {c.effect:+.3f} nats/token; halved {c.halved:+.3f}, negated "
            f"{c.negated:+.3f}, random ones of its norms up to {max(c.random):+.3f}{other}"
        )
    if p.dial:
        console.print(f"  {p.backend} adapter's dial against the coefficient's: {', '.join(map(str, p.dial))}")
    if p.file_error is not None:
        console.print(
            f"  {p.backend} {p.form} on disk: {p.file_error:.0e} nats/token from the weights that were compiled"
        )
    console.print(f"  {p.backend} {p.form} less steered [90 %]: {escape('; '.join(map(str, p.tests)))}")
    if p.capability is not None:
        console.print(f"  {p.backend} {p.form}: {p.capability}")
    if p.rounding is not None:
        console.print(f"  {p.backend} {p.form}: {p.rounding}; with it KL {p.kl_per_token:.1e}, share {p.kl_share:.3%}")
    for reason in p.reasons:
        console.print(f"  [red]{p.backend} {p.form}[/red]: {escape(reason)}")


def print_samples(
    console: Console, ask: str, report: ValidationReport, parities: Sequence[Parity], factor: float
) -> None:
    """One prompt answered by base, steered and compiled, and by a coefficient that is too high."""
    console.print(f"[bold]{escape(ask)}[/bold]")
    answers = [("base", report.samples["base"]), (f"steered, {report.coefficient:g}", report.samples["steered"])]
    answers += [(f"compiled, {p.backend}", p.sample) for p in parities if p.form == "merged-fp32"]
    too_high = f"steered, {report.coefficient * factor:g}: too high"
    for name, text in [*answers, (too_high, report.samples["too_high"])]:
        console.print(f"  [cyan]{name}[/cyan]: {escape(' '.join(text.split()))}")
