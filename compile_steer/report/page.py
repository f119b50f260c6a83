"""One self-contained HTML page for a run: no scripts, charts inline as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from compile_steer.artifacts.files import save_text
from compile_steer.common.errors import plain
from compile_steer.report.render import render
from compile_steer.report.terminal import details
from compile_steer.validation.report import ValidationReport, block_name
from compile_steer.verification.parity import Parity

if TYPE_CHECKING:
    from compile_steer.lowering.plan import Choice
    from compile_steer.recipe import Recipe
    from compile_steer.report.recommendation import Recommendation


def write_page(
    path: Path,
    recipe: Recipe,
    program: str,
    choices: Sequence[Choice],
    report: ValidationReport,
    parities: Sequence[Parity],
    recommendation: Recommendation,
    curves: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """Write the page atomically; `curves` holds the losses of each thing that was trained."""
    page = render(
        "page.html",
        recipe=recipe,
        program=program,
        choices=choices,
        report=report,
        parities=parities,
        recommendation=recommendation,
        details=details,
        charts=[
            _svg(2.8, 3, partial(_draw_sweep, report)),
            _svg(1.9, 1, partial(_draw_controls, report)),
            _svg(2.4, 3, partial(_draw_coefficients, report)),
        ],
        training=_svg(2.4, len(curves), partial(_draw_losses, curves)) if curves else "",
    )
    save_text(path, page)


def _draw_sweep(report: ValidationReport, panels: Sequence[Any]) -> None:
    """Margin and perplexity over the coefficient, a line per layer; score over perplexity, with the frontier and the choice."""
    left, right, prices = panels
    for layer in sorted({point.layer for point in report.grid}):
        points = sorted((p for p in report.grid if p.layer == layer and not p.skipped), key=lambda p: p.coefficient)
        coefficients = [p.coefficient for p in points]
        left.plot(coefficients, [p.margin for p in points], marker="o", label=block_name(layer))
        right.plot(coefficients, [p.perplexity_ratio for p in points], marker="o")
    left.set(xlabel="coefficient", ylabel="margin, nats/token")
    right.set(xlabel="coefficient", ylabel="perplexity of control text, x base")
    left.legend(title="block", fontsize=7, title_fontsize=7)
    chosen = [p for p in report.grid if (p.layer, p.coefficient) == (report.layer, report.coefficient)]
    answered = [point for point in [*report.grid, *chosen] if point.cost is not None]
    prices.plot([p.cost for p in answered], [p.score for p in answered], "o", color="grey")
    prices.plot([p.cost for p in report.frontier], [p.score for p in report.frontier], "-", color="grey")
    prices.plot([p.cost for p in chosen], [p.score for p in chosen], "o", color="green", markersize=9)
    prices.axvline(1.0, color="red", linewidth=0.8, linestyle=":")
    prices.set(xlabel="cost, part of a limit used", ylabel="score, validation prompts")


def _draw_controls(report: ValidationReport, panels: Sequence[Any]) -> None:
    """The effect among the effects of other directions of the same length."""
    c, (axes,) = report.controls, panels
    groups = {
        "random": c.random,
        c.shuffled_kind.removeprefix("from "): c.shuffled,
        "another behaviour": [] if c.other_behaviour is None else [c.other_behaviour],
        "opposite sign": [c.opposite],
        "this direction": [c.effect],
    }
    for row, values in enumerate(groups.values()):
        axes.plot(values, [row] * len(values), "o", alpha=0.6)
    axes.set_yticks(range(len(groups)), [_label(name) for name in groups])
    axes.axvline(0, color="grey", linewidth=0.7)
    axes.set(xlabel="change of log p(positive) - log p(negative), nats/token")


def _draw_coefficients(report: ValidationReport, panels: Sequence[Any]) -> None:
    """Margin, perplexity and score of the chosen layer over the coefficient; red where perplexity crosses its limit."""
    sweep = report.coefficient_sweep
    coefficients = [point.coefficient for point in sweep.points]
    names = ("margin", "perplexity_ratio", "score")
    labels = ("margin, nats/token", "perplexity of control text, x base", "score")
    for axes, name, label in zip(panels, names, labels, strict=True):
        axes.plot(coefficients, [getattr(point, name) for point in sweep.points], marker="o", markersize=3)
        axes.axvline(report.coefficient, color="green", linewidth=0.8)
        for crossing in (sweep.negative_crossing, sweep.crossing):
            if crossing is not None:
                axes.axvline(crossing, color="red", linewidth=0.8, linestyle=":")
        axes.set(xlabel="coefficient", ylabel=label)
    panels[1].set_yscale("log")


def _draw_losses(curves: Mapping[str, Mapping[str, Sequence[float]]], panels: Sequence[Any]) -> None:
    """The loss of every step, a panel each."""
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        axes.plot(curve["loss"], linewidth=0.8)
        axes.set(title=_label(name), xlabel="step", ylabel="loss", yscale="log")


def _label(name: str) -> str:
    return shorten(plain(name), 60, placeholder="...")  # what is drawn must fit, and needs a glyph a character


def _svg(height: float, panels: int, draw: Callable[[Sequence[Any]], None]) -> Markup:
    """A row of panels as inline SVG; `height` is in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot, whose figures stay in memory until they are closed

    figure, stream = Figure(figsize=(8, height), layout="constrained"), StringIO()
    with rc_context({"text.parse_math": False}):  # a name with $ is no formula
        draw(figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(stream, format="svg", metadata={"Date": None})  # no date: the same run writes the same page
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML header, which HTML cannot hold
