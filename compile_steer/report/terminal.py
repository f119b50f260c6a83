"""The results of a run as tables and lines in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compile_steer.validation.report import ValidationReport, block_name
from compile_steer.verification.parity import BehaviourMatch, Parity
from compile_steer.verification.prompt_report import PromptSet

if TYPE_CHECKING:
    from compile_steer.extraction.generate_pairs import GenerationReport
    from compile_steer.lowering.plan import Choice
    from compile_steer.report.recommendation import Recommendation

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def print_validation(console: Console, report: ValidationReport) -> None:
    """Print the sweep, and the verdict with its reasons."""
    title = "Sweep on validation data (*: no cheaper point scores as much; green: chosen; cost: largest part of a limit used)"
    table = Table(title=title, title_justify="left")
    for heading in (
        "layer",
        "coefficient",
        "margin, nats/token",
        "perplexity",
        "score",
        "repetition",
        "right answers",
        "cost",
    ):
        table.add_column(heading, justify="right")
    for point in report.grid:
        chosen = (point.layer, point.coefficient) == (report.layer, report.coefficient)
        table.add_row(
            block_name(point.layer),
            f"{point.coefficient:.3g}",
            "skipped" if point.margin is None else f"{point.margin:+.3f}",
            "" if point.perplexity_ratio is None else f"x{point.perplexity_ratio:.2f}",
            "" if point.score is None else f"{point.score:.2f}{' *' if point in report.frontier else ''}",
            "" if point.repetition is None else f"{point.repetition:.2f}",
            "" if point.lost_answers is None else f"{-100 * point.lost_answers:+.0f} points",
            "" if point.cost is None else f"{point.cost:.0%}",
            style="bold green" if chosen else "",
        )
    console.print(table)
    verdict = (report.verdict.upper(), f"bold {_COLOURS[report.verdict]}")
    console.print(Text.assemble(("Verdict on test data: ", "bold"), verdict, f"; {report.headline}"))
    price = [f"costs: {effect}" for effect in report.side_effects]
    if report.wordings:
        first = report.wordings[0]
        price.append(
            f"in other words, on {first.n} test pairs ({first.as_given:+.3f} nats/token as they are): "
            + ", ".join(map(str, report.wordings))
        )
    for line in [*(f"- {reason}" for reason in report.reasons), *price, *report.notes]:
        console.print(f"  {line}")
    s = report.separability
    console.print(
        f"  held-out pairs separated with AUROC {s.auroc:.2f}, d' {s.d_prime:.1f}; steerability "
        f"{report.steerability:+.3f} nats/token per unit of coefficient, {report.wrong_way:.0%} of pairs the wrong way; "
        f"strength {report.coherence.strength:.2f} of the stream's norm"
    )


def print_generation(console: Console, report: GenerationReport, folder: Path) -> None:
    """Print what was generated and kept, a line for each split."""
    for name, split in report.splits.items():
        console.print(f"{name}: {split.describe()}; {split.generated} responses generated")
    console.print(f"Pairs: {folder}")


def print_plan(console: Console, program: str, choices: Sequence[Choice]) -> None:
    """Print for every backend whether it runs, or why not, and which form it cannot export."""
    console.print(Text.assemble(("Plan", "bold"), f" for {program}"))
    refused = ("refused", "red")
    for choice in choices:
        name = f"  {choice.backend:<14} "
        if choice.refusal is not None:
            console.print(Text.assemble(name, refused, f": {choice.refusal}"))
            continue
        console.print(Text.assemble(name, ("chosen", "green") if choice.chosen else "possible, not chosen"))
        if choice.adapter_refusal is not None:
            console.print(Text.assemble(f"  {'':<14} as adapter ", refused, f": {choice.adapter_refusal}"))


def print_parities(console: Console, parities: Sequence[Parity]) -> None:
    """Print a table of all artifacts, the prompt sets, and for each artifact its details and why it failed."""
    if not parities:
        return
    for p in parities:  # first of all, so that nobody takes a check that was not made for one that passed
        console.print(Text.assemble(f"{p.backend} {p.form}: ", (p.verdict, "green" if p.passed else "red")))
    first = parities[0].divergence
    title = (
        f"Compiled against steered, {first.n_tokens} held-out response tokens "
        f"(KL(steered||base) = {first.kl_base:.3f} nats/token, base top-1 {first.top1_base:.1%})"
    )
    table = Table("artifact", title=title, title_justify="left")
    headings = ("KL", "remaining KL [95 %]", "top-1", "effect retained [95 %]", "score", "control KL", "seconds")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("")
    for p in parities:
        remaining, retained = p.divergence.kl_remaining, p.behaviour.effect_retained
        table.add_row(
            f"{p.backend} {p.form}",
            f"{p.divergence.kl.value:.1e}",
            f"{remaining.value:.3%} [{100 * remaining.low:.3f}, {100 * remaining.high:.3f}]",
            f"{p.divergence.top1:.2%}",
            "-" if retained is None else str(retained),
            f"{p.behaviour.score_compiled:.2f}",
            f"{p.divergence.kl_control:.3f}",
            f"{p.compile_seconds:.1f}",
            Text("passed", "green") if p.passed else Text("FAILED", "red"),
        )
    console.print(table)
    scores = parities[0].behaviour
    console.print(
        f"  score: base {scores.score_base:.2f}, steered {scores.score_steered:.2f}; KL from the base on control text: "
        f"steered {first.kl_control_steered:.3f} nats/token; seconds: of the compile alone"
    )
    console.print(_prompt_set_table(parities))
    for p in parities:
        for label, text in details(p):
            console.print(f"  {p.backend} {p.form}, {label}: {text}")
        for reason in p.reasons:
            console.print(Text.assemble("  ", (f"{p.backend} {p.form}", "red"), f": {reason}"))
        for check in p.unchecked:
            name = (f"{p.backend} {p.form}, not checked: {check.name}", "yellow")
            console.print(Text.assemble("  ", name, f": {check.text}"))


def print_recommendation(console: Console, recommendation: Recommendation) -> None:
    """Print which artifact to ship and why, and a line for each other one."""
    style = "bold green" if recommendation.artifact else "bold red"
    console.print(Text.assemble("\n", (str(recommendation), style)))
    for line in recommendation.others:
        console.print(f"  {line}")


def _prompt_set_table(parities: Sequence[Parity]) -> Table:
    """How much of the steered model's answers each model writes by itself, on every prompt set."""
    sets = parities[0].prompt_sets
    scored = any(prompts.greedy.score is not None for prompts in sets)
    title = (
        "Free answers, greedy, sampled: fraction of tokens before the first that differs from steered (remaining KL)"
    )
    table = Table("", title=title + ("; score" if scored else ""), title_justify="left")
    for prompts in sets:
        table.add_column(f"{prompts.name}, {prompts.prompt_tokens:,} tokens", justify="right")

    def scores(prompts: PromptSet, of: str) -> str:
        greedy, sampled = getattr(prompts.greedy, of), getattr(prompts.sampled, of)
        return "" if greedy is None or sampled is None else f"; {greedy:.2f}, {sampled:.2f}"

    same = [f"{s.greedy.same_base:.0%}, {s.sampled.same_base:.0%}{scores(s, 'score_base')}" for s in sets]
    table.add_row("base", *same)
    if scored:
        table.add_row("steered", *(f"-{scores(s, 'score_steered')}" for s in sets))
    for p in parities:
        table.add_row(f"{p.backend} {p.form}", *(f"{s}{scores(s, 'score')}" for s in p.prompt_sets))
    return table


def details(p: Parity) -> list[tuple[str, str]]:
    """Return what the table has no column for, as (label, text): for the terminal, the page and the card."""
    d, b = p.divergence, p.behaviour
    lines = [
        (
            "tokens",
            f"KL rms {d.kl_rms:.1e}, p99 {d.kl_p99:.1e}, at the prompts' positions {d.kl_prompt:.1e} nats/token; final hidden "
            f"states: gain {d.gain:.3f}, relative error {d.hidden_error:.1e}",
        ),
        ("compiled minus steered [90 %]", "; ".join(map(str, b.tests))),
        ("score", score_basis(b)),
        ("repeated 3-grams", f"{b.repetition_compiled:.2f} (steered {b.repetition_steered:.2f})"),
    ]
    if p.contexts:
        lines.append(("remaining KL by tokens of context [95 %]", "; ".join(map(str, p.contexts))))
    if p.inherited:
        lines.append(("measured once", p.inherited))
    if p.wordings:
        each = (f"{wording.name} {wording.kl_remaining or 0.0:.2%}" for wording in p.wordings)
        lines.append(("remaining KL by wording", ", ".join(each)))
    if p.file_error is not None:
        lines.append(("on disk", f"{p.file_error:.0e} nats/token from the weights that were compiled"))
    if p.capability is not None:
        lines.append(("capability", f"{p.capability}; {p.capability.test}"))
    if p.rounding is not None:
        remaining = f"with it KL {d.kl.value:.1e}, remaining {d.kl_remaining.value:.3%}"
        lines.append(("stored in fewer bits", f"{p.rounding}; {remaining}"))
    if (c := p.adapter) is not None:
        other = "" if c.other_behaviour is None else f"; another behaviour's pairs {c.other_behaviour:+.3f}"
        random = f"random ones of its norms up to {max(c.random):+.3f}"
        effects = f"{c.effect:+.3f} nats/token; halved {c.halved:+.3f}, negated {c.negated:+.3f}, {random}{other}"
        lines.append((f"adapter on {c.n_pairs} test pairs", effects))
        remark = f"; {c.scale_remark}" if c.scale_remark else ""
        lines.append(("adapter scale against program scale", ", ".join(map(str, c.scales)) + remark))
    return lines


def score_basis(b: BehaviourMatch) -> str:
    """Return what the test of the score rests on."""
    greedy = f"by each model's own greedy answers to {b.n_prompts} test prompts"
    if b.sampled is None:
        return f"{greedy}; no sampled answers were weighted"
    return f"{greedy}, because {b.sampled.rejected} ({b.sampled})" if b.sampled.rejected else f"by {b.sampled}"


def print_samples(
    console: Console, ask: str, report: ValidationReport, parities: Sequence[Parity], factor: float
) -> None:
    """Print one prompt's answers by base, steered and compiled model, and with a coefficient that is too high."""
    console.print(ask, style="bold")
    answers = [("base", report.samples["base"]), (f"steered, {report.coefficient:g}", report.samples["steered"])]
    answers += [(f"compiled, {p.backend}", p.behaviour.sample) for p in parities if p.form == "merged-fp32"]
    too_high = f"steered, {report.coefficient * factor:g}: too high"
    for name, text in [*answers, (too_high, report.samples["too_high"])]:
        console.print(Text.assemble("  ", (name, "cyan"), f": {' '.join(text.split())}"))
