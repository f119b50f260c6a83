"""One self-contained HTML page for a run: no scripts, charts inline as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from compile_steer.artifacts.files import save_text
from compile_steer.report.terminal import details
from compile_steer.validation.report import ValidationReport, block_name
from compile_steer.verification.parity import Parity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compile_steer.lowering.plan import Choice
    from compile_steer.recipe import Recipe


def write_page(
    path: Path,
    recipe: Recipe,
    program: str,
    choices: Sequence[Choice],
    report: ValidationReport,
    parities: Sequence[Parity],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Write the page atomically; `curves` holds the losses of each thing that was trained."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compile_steer.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html").render(
        recipe=recipe,
        program=program,
        choices=choices,
        report=report,
        parities=parities,
        details=details,
        charts=[_sweep_chart(report), _control_chart(report), _coefficient_chart(report)],
        training=_loss_chart(curves) if curves else "",
    )
    save_text(path, page)


def _sweep_chart(report: ValidationReport) -> str:
    """Log-likelihood margin and perplexity over the coefficient, one line per layer."""
    figure = _figure(2.8)
    left, right = figure.subplots(1, 2)
    for layer in sorted({point.layer for point in report.grid}):
        points = sorted((p for p in report.grid if p.layer == layer and not p.skipped), key=lambda p: p.coefficient)
        coefficients = [p.coefficient for p in points]
        left.plot(coefficients, [p.margin for p in points], marker="o", label=block_name(layer))
        right.plot(coefficients, [p.perplexity_ratio for p in points], marker="o")
    left.set(xlabel="coefficient", ylabel="margin, nats/token")
    right.set(xlabel="coefficient", ylabel="perplexity of control text, x base")
    left.legend(title="block", fontsize=7, title_fontsize=7)
    return _svg(figure)


def _control_chart(report: ValidationReport) -> str:
    """The effect among the effects of other directions of the same length."""
    c = report.controls
    figure = _figure(1.9)
    axes = figure.subplots()
    groups = {
        "random": c.random,
        c.shuffled_kind.removeprefix("from "): c.shuffled,
        "another behaviour": [] if c.other_behaviour is None else [c.other_behaviour],
        "opposite sign": [c.opposite],
        "this direction": [c.effect],
    }
    for row, values in enumerate(groups.values()):
        axes.plot(values, [row] * len(values), "o", alpha=0.6)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.axvline(0, color="grey", linewidth=0.7)
    axes.set(xlabel="change of log p(positive) - log p(negative), nats/token")
    return _svg(figure)


def _coefficient_chart(report: ValidationReport) -> str:
    """Margin, perplexity and score of the chosen layer over the coefficient; red where perplexity crosses its limit."""
    sweep = report.coefficient_sweep
    figure = _figure(2.4)
    panels = figure.subplots(1, 3)
    coefficients = [point.coefficient for point in sweep.points]
    for axes, (name, label) in zip(
        panels,
        (
            ("margin", "margin, nats/token"),
            ("perplexity_ratio", "perplexity of control text, x base"),
            ("score", "score"),
        ),
        strict=True,
    ):
        axes.plot(coefficients, [getattr(point, name) for point in sweep.points], marker="o", markersize=3)
        axes.axvline(report.coefficient, color="green", linewidth=0.8)
        for crossing in (sweep.negative_crossing, sweep.crossing):
            if crossing is not None:
                axes.axvline(crossing, color="red", linewidth=0.8, linestyle=":")
        axes.set(xlabel="coefficient", ylabel=label)
    panels[1].set_yscale("log")
    return _svg(figure)


def _loss_chart(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The loss of every step, a panel each."""
    figure = _figure(2.4)
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(curve["loss"], linewidth=0.8)
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    return _svg(figure)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot, whose figures stay in memory until they are closed

    return Figure(figsize=(8, height), layout="constrained")


def _svg(figure: Figure) -> str:
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
