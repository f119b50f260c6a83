"""One self-contained HTML page for a run: no scripts, charts inline as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined

from compile_steer.artifacts.files import save_text
from compile_steer.lower.plan import Choice
from compile_steer.recipe import Recipe
from compile_steer.validate.report import ValidationReport, block_name
from compile_steer.verify.parity import Parity

matplotlib.use("svg")
from matplotlib.figure import Figure


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
    environment = Environment(
        loader=PackageLoader("compile_steer", "templates"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html").render(
        recipe=recipe,
        program=program,
        choices=choices,
        report=report,
        parities=parities,
        charts=[_sweep_chart(report), _control_chart(report), _dose_chart(report)],
        training=_loss_chart(curves) if curves else "",
    )
    save_text(path, page)


def _sweep_chart(report: ValidationReport) -> str:
    """Contrast and perplexity over the coefficient, a line a layer: the dose and its price."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for layer in sorted({cell.layer for cell in report.sweep}):
        cells = sorted((c for c in report.sweep if c.layer == layer and not c.skipped), key=lambda c: c.coefficient)
        doses = [c.coefficient for c in cells]
        left.plot(doses, [c.contrast for c in cells], marker="o", label=block_name(layer))
        right.plot(doses, [c.perplexity_ratio for c in cells], marker="o")
    left.set(xlabel="coefficient", ylabel="contrast, nats/token")
    right.set(xlabel="coefficient", ylabel="neutral perplexity, x base")
    left.legend(title="block", fontsize=7, title_fontsize=7)
    return _svg(figure)


def _control_chart(report: ValidationReport) -> str:
    """The effect among the effects of other directions of the same length."""
    c = report.controls
    figure = Figure(figsize=(8, 1.9), layout="constrained")
    axes = figure.subplots()
    groups = {
        "random": c.random,
        c.kind.removeprefix("from "): c.shuffled,
        "another behaviour": [] if c.mismatched is None else [c.mismatched],
        "opposite sign": [c.opposite],
        "this direction": [c.effect],
    }
    for row, values in enumerate(groups.values()):
        axes.plot(values, [row] * len(values), "o", alpha=0.6)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.axvline(0, color="grey", linewidth=0.7)
    axes.set(xlabel="change of log p(positive) - log p(negative), nats/token")
    return _svg(figure)


def _dose_chart(report: ValidationReport) -> str:
    """What the dial does at the chosen layer: contrast, neutral perplexity and score, and where the wall is."""
    found = report.doses
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    panels = figure.subplots(1, 3)
    doses = [dose.coefficient for dose in found.doses]
    for axes, (what, label) in zip(
        panels,
        (("contrast", "contrast, nats/token"), ("perplexity_ratio", "neutral perplexity, x base"), ("score", "score")),
        strict=True,
    ):
        axes.plot(doses, [getattr(dose, what) for dose in found.doses], marker="o", markersize=3)
        axes.axvline(report.coefficient, color="green", linewidth=0.8)
        for wall in (found.negative_wall, found.wall):
            if wall is not None:
                axes.axvline(wall, color="red", linewidth=0.8, linestyle=":")
        axes.set(xlabel="coefficient", ylabel=label)
    panels[1].set_yscale("log")
    return _svg(figure)


def _loss_chart(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The loss of every step, a panel each."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot(curve["loss"], linewidth=0.8)
        axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    return _svg(figure)


def _svg(figure: Figure) -> str:
    stream = StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
