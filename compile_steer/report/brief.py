"""What a command prints unless it is asked for every figure: plain words, few lines, readable from 60 columns on."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from compile_steer.artifacts.paths import RunPaths
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.detail import Detail, detail
from compile_steer.common.errors import shell_word
from compile_steer.export.engine_support import engine_support
from compile_steer.lowering.plan import Choice
from compile_steer.report.recommendation import Recommendation
from compile_steer.validation.options import ValidateOptions
from compile_steer.validation.report import GridPoint, ValidationReport
from compile_steer.verification.parity import Parity

_VERDICTS = {
    "pass": ("PASS: steering shows the behaviour", "green"),
    "fail": ("FAIL: not worth compiling", "red"),
    "inconclusive": ("INCONCLUSIVE: too little to tell", "yellow"),
}
_METHODS = {
    "bias": "exact: the shift becomes the bias of one layer",
    "orthogonalise": "exact: the direction is taken out of all matrices that write it",
    "retarget": "exact: the checkpoint is rewritten as a Llama's, which has room for a bias",
    "closed_form": "fitted: a small LoRA adapter, by linear regression",
    "distill": "trained: the same adapter, then trained to imitate the steered model",
    "full": "trained: all weights imitate the steered model",
    "full_cut": "trained, then cut to a LoRA adapter",
}


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 0 < n < len(headings) - 1 else "left")
    return table


def _print_indented(console: Console, text: Text) -> None:
    console.print(Padding(text, (0, 0, 0, 2)))


def print_sweep(console: Console, report: ValidationReport) -> None:
    """Print the best coherent point of each layer, the chosen one marked."""

    def is_chosen(point: GridPoint) -> bool:
        return (point.layer, point.coefficient) == (report.layer, report.coefficient)

    table = _table("  layer", "strength", "shows it", "ordinary text", "")
    for layer in dict.fromkeys(point.layer for point in report.grid):
        points = [point for point in report.grid if point.layer == layer]
        point = max(points, key=lambda point: (is_chosen(point), point.score or -1, point.margin or -math.inf))
        chosen = is_chosen(point)
        table.add_row(
            "  all" if point.layer < 0 else f"  {point.layer}",
            f"{point.coefficient:.3g}",
            "-" if point.score is None else f"{point.score:.0%}",
            "-" if point.perplexity_ratio is None else f"x{point.perplexity_ratio:.2f}",
            "<- chosen" if chosen else "",
            style="bold green" if chosen else "",
        )
    console.print(table)


def print_verdict(console: Console, report: ValidationReport, options: ValidateOptions) -> None:
    """Print the verdict on the direction in one panel: what is gained, what it costs, or what to do about it."""
    title, colour = _VERDICTS[report.verdict]
    s, effect, limit = report.scores, report.scores.effect, options.max_perplexity_ratio
    others = f"random directions {s.random:.0%}" + (
        "" if s.instructed is None else f", asking for it {s.instructed:.0%}"
    )
    change = f"{100 * effect.low:+.0f} to {100 * effect.high:+.0f} points"
    costs = [f"ordinary text surprises it {report.coherence.perplexity_ratio:.2f} times as much (limit {limit:g})"]
    costs += [f"{e.name} {e.base:.0%} before, {e.steered:.0%} steered" for e in report.side_effects if e.shown]
    lines = [
        Text.assemble(
            "Answers that show it: ",
            (f"{s.base:.0%} before, {s.steered:.0%} steered", "bold"),
            f" ({report.n_prompts} test prompts, 95 % sure of {change}); {others}",
        ),
        Text(f"Price: {'; '.join(costs)}"),
    ]
    if report.verdict != "pass":
        *reasons, advice = report.reasons
        lines.insert(0, Text.assemble(("Do: ", "bold"), advice.removeprefix("advice: ")))
        lines += [Text(f"- {reason}", "red" if report.verdict == "fail" else "yellow") for reason in reasons]
    lines += [Text(f"Beware: the two sides of the pairs also differ in {c.name}", "yellow") for c in report.confounds]
    if weak := [wording.name for wording in report.wordings if not wording.holds]:
        lines.append(Text(f"Weak (below half) where prompts are put otherwise: {', '.join(weak)}", "yellow"))
    for power in report.power:
        if power.available < power.needed and power.detectable is not None and report.verdict != "pass":
            samples = "pairs" if "margin" in power.measure else "prompts"
            lines.append(
                Text(
                    f"Not shown: a change of the {power.measure} below {power.detectable:.2g} (needs {power.needed:,} test "
                    f"{samples} for {power.effect:g}; there are {power.available})",
                    "yellow",
                )
            )
    heading = Text(title, f"bold {colour}")
    console.print(Panel(Text("\n").join(lines), title=heading, title_align="left", border_style=colour))


def print_methods(console: Console, choices: Sequence[Choice]) -> None:
    """Print how each chosen backend turns the program into weights, and why none can where that is so."""
    for choice in choices:
        if choice.chosen:
            note = "" if choice.adapter_refusal is None else " (no adapter)"
            _print_indented(
                console, Text.assemble((f"{choice.backend:<12}", "bold"), f" {_METHODS[choice.backend]}{note}")
            )


def print_artifacts(console: Console, parities: Sequence[Parity]) -> None:
    """Print a row for each artifact, then every failed gate on a line of its own, then what too little was measured for."""
    table = _table("  file", "missing of the steering", "same next word", "")
    for p in parities:
        table.add_row(
            f"  {p.backend} {p.form}",
            f"{p.divergence.kl_remaining.value:.3%}",
            f"{p.divergence.top1:.1%}",
            Text("PASS", "bold green") if p.passed else Text("FAIL", "bold red"),
        )
    console.print(table)
    for p in parities:
        for reason in p.reasons:
            _print_indented(console, Text(f"FAIL {p.backend} {p.form}: {reason}", "red"))
    # What is not as it should be there, then what too little was measured for.
    unmeasured = {name: text for p in parities for name, text in p.unmeasured.items()}
    lines = [f"not checked: {name}: {text}" for name, text in unmeasured.items()]
    scores = [p.behaviour.score for p in parities if any(check.name == "score" for check in p.unchecked)]
    others = {check.name for p in parities for check in p.unchecked} - {"score", *unmeasured}
    short = []
    if scores:
        most = max(scores, key=lambda score: score.needed)
        short.append(f"not shown: that answers score the same (needs {most.needed:,} prompts, there are {most.n})")
    if others:
        short.append(f"not checked: {', '.join(sorted(others))} (why: --verbose)")
    lines += ["; ".join(short)] if short else []
    for line in lines:
        _print_indented(console, Text(line, "yellow"))


def print_answers(console: Console, ask: str, report: ValidationReport, parities: Sequence[Parity]) -> None:
    """Print the recipe's question and its answers, a line each."""
    console.print(Text(f"  {ask}", "bold"))
    best = next((p for p in parities if p.passed), None)
    answers = [("base", report.samples["base"]), ("steered", report.samples["steered"])]
    answers += [("compiled", best.behaviour.sample)] if best else []
    for name, text in answers:
        line = Text.assemble("  ", (f"{name:<9}", "cyan"), " ".join(text.split()))
        console.print(line, no_wrap=True, overflow="ellipsis")


def print_end(console: Console, recommendation: Recommendation, paths: RunPaths) -> None:
    """Print what to ship, and what to do next: commands that work as they stand."""
    colour, folder = "green" if recommendation.artifact else "red", recommendation.folder
    if detail.get() == Detail.QUIET:
        console.print(str(recommendation), soft_wrap=True)
        return
    title = f"SHIP {folder or recommendation.artifact}" if recommendation.artifact else "SHIP NONE"
    console.print(Text.assemble((title, f"bold {colour}"), f": {recommendation.reason}"))
    ours = _program()
    steps = {"look at it": str(paths.report)}
    if folder is not None:
        steps |= {
            "talk to it": f"{ours} chat {shell_word(paths.out)}",
            "load it": f"cat {shell_word(folder / 'README.md')}  # code for transformers and the serving engines",
        }
        loads = {support.name for support in engine_support(Provenance.read(folder), folder) if support.commands}
        if "llama.cpp" in loads:
            to = Path("gguf", folder.name)
            steps["serve it"] = f"{ours} export {shell_word(folder)} --for llama.cpp --out {shell_word(to)}"
        steps["make your own"] = f"{ours} new pirate --behaviour 'speaks like a pirate'"
    for name, line in steps.items():
        console.print(Text.assemble(f"  {name:<14} ", (line, "bold")), soft_wrap=True)


def _program() -> str:
    """How a person calls this very program: by its name where the shell finds it, by its path elsewhere."""
    called = Path(sys.argv[0])
    if called.name == "compile-steer":
        on_path = shutil.which(called.name)
        return called.name if on_path and Path(on_path).samefile(called) else shell_word(called)
    return f"{shell_word(sys.executable)} -m compile_steer"
