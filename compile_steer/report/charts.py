"""The charts of a run's page, as inline SVG in the colours of the text around them. Every mean is drawn with its n and interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import StringIO
from textwrap import shorten
from typing import Any

from markupsafe import Markup

from compile_steer.common.errors import plain
from compile_steer.validation.report import ValidationReport, block_name
from compile_steer.verification.options import VerifyOptions
from compile_steer.verification.parity import Parity

_INK, _GREY, _BLUE, _GREEN, _RED = "#010203", "#8a8a8a", "#3b7dd8", "#1f9d55", "#d64545"
_Z = 1.96  # of a 95 % interval
# Figures below are drawn on a logarithmic axis from here; an exact compile leaves 1e-10 % or so.
_LEAST_PERCENT = 1e-3
_CURVE = 10  # losses that make a curve


def wilson(mean: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a mean of n scores from 0 to 1; of scores between them it is wider than need be."""
    middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(mean * (1 - mean) / n + (_Z / (2 * n)) ** 2) / (1 + _Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


class _Chart:
    """One panel; `axes` is matplotlib's."""

    def __init__(self, rows: int = 0) -> None:
        from matplotlib.figure import Figure  # not pyplot, whose figures stay in memory until they are closed

        self.figure = Figure(figsize=(4.8, 0.9 + 0.33 * rows if rows else 3.0), layout="constrained")
        self.axes: Any = self.figure.subplots()
        self.axes.spines[["top", "right"]].set_visible(False)

    def names(self, names: Sequence[str]) -> None:
        """Name the rows, the first on top."""
        self.axes.set_yticks(range(len(names)), [_label(name) for name in names])
        self.axes.set_ylim(len(names) - 0.5, -0.5)

    def interval(self, x: float, y: float, bounds: tuple[float, float], colour: str, *, upright: bool = False) -> None:
        place = y if upright else x
        away = [[max(place - bounds[0], 0)], [max(bounds[1] - place, 0)]]
        error = {"yerr" if upright else "xerr": away}
        self.axes.errorbar(x, y, **error, fmt="o", color=colour, markersize=6, capsize=3, linewidth=1.4)

    def svg(self) -> Markup:
        stream = StringIO()
        self.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        text = stream.getvalue()
        # Without the XML header, which HTML cannot hold.
        return Markup(text[text.index("<svg") :].replace(_INK, "currentColor"))


def _style() -> Any:
    from matplotlib import rc_context

    inked: Any = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return rc_context(
        {
            **dict.fromkeys(inked, _INK),
            "text.parse_math": False,  # a name with $ is no formula
            "svg.fonttype": "none",  # text that can be read aloud, found and copied
            "svg.hashsalt": "compile_steer",  # the same run writes the same page
            "font.family": "sans-serif",
            "font.size": 10.5,
            "legend.frameon": False,
        }
    )


def carries(report: ValidationReport) -> list[Markup]:
    """Does the direction carry the behaviour: scores by condition, and its effect among those of other directions."""
    s, c = report.scores, report.controls
    scores = {"base": s.base, "random directions": s.random, "asked in the prompt": s.instructed}
    scores |= {"shown examples": s.few_shot, "steered": s.steered}
    measured = {name: score for name, score in scores.items() if score is not None}
    with _style():
        left = _Chart(len(measured))
        left.names(list(measured))
        for row, (name, score) in enumerate(measured.items()):
            colour = _GREEN if name == "steered" else _BLUE
            left.interval(score, row, wilson(score, report.n_prompts), colour)
        left.axes.set(xlim=(-0.02, 1.02), xlabel=f"mean score, 95 % interval (n = {report.n_prompts})")
        groups = {
            f"{len(c.random)} random": c.random,
            f"{len(c.shuffled)} {c.shuffled_kind}": c.shuffled,
            "another behaviour's": [] if c.other_behaviour is None else [c.other_behaviour],
            "opposite sign": [c.opposite],
            "this direction": [c.effect],
        }
        right = _Chart(len(groups))
        right.names(list(groups))
        for row, values in enumerate(groups.values()):
            right.axes.plot(values, [row] * len(values), "o", color=_GREEN if row == 4 else _BLUE, alpha=0.6)
        right.axes.axvline(0, color=_GREY, linewidth=0.8)
        right.axes.set(xlabel="change of the margin, nats/token")
        return [left.svg(), right.svg()]


def costs(report: ValidationReport, n_prompts: int) -> Markup:
    """What does it cost: the score that each strength bought, by its price; empty for a report that knows no costs.

    The coefficient sweep is not drawn: its few prompts and texts can be far from what the test measures.

    Args:
        n_prompts: validation prompts that were answered at each point of the sweep.
    """
    tested = report.scores.steered, wilson(report.scores.steered, report.n_prompts)
    answered = {
        (p.layer, p.coefficient): (p.cost, p.score) for p in report.grid if p.cost is not None and p.score is not None
    }
    if not answered:
        return Markup()
    with _style():
        chart = _Chart()
        for (layer, coefficient), (cost, score) in answered.items():
            chart.interval(cost, score, wilson(score, n_prompts), _BLUE, upright=True)
            where = f"{block_name(layer)} x{coefficient:.3g}"
            chart.axes.annotate(where, (cost, score), xytext=(4, 4), textcoords="offset points", fontsize=8)
            if (layer, coefficient) == (report.layer, report.coefficient):
                chart.interval(cost + 0.015, *tested, _GREEN, upright=True)  # beside it, so that both are seen
        chart.axes.plot([], [], "o", color=_BLUE, label=f"tried: block x coefficient ({n_prompts} validation prompts)")
        chart.axes.plot([], [], "o", color=_GREEN, label=f"the chosen one on test data ({report.n_prompts} prompts)")
        chart.axes.axvline(1, color=_RED, linewidth=0.9, linestyle="--", label="limit")
        chart.axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=8.5)
        chart.axes.set(
            ylim=(-0.02, 1.02), xlabel="cost: part of a limit that is used up", ylabel="mean score, 95 % interval"
        )
        return chart.svg()


def is_steered(parities: Sequence[Parity], options: VerifyOptions) -> list[Markup]:
    """Is the file the steered model: what is missing, and what is retained, with the limits that it has to keep."""
    names, gates = [f"{p.backend} {p.form}" for p in parities], options.gates
    with _style():
        left, right = _Chart(len(names)), _Chart(len(names))
        left.names(names)
        right.names(names)
        for row, p in enumerate(parities):
            colour, missing = _GREEN if p.passed else _RED, p.divergence.kl_remaining
            value, low, high = (max(100 * v, _LEAST_PERCENT) for v in (missing.value, missing.low, missing.high))
            left.interval(value, row, (low, high), colour)
            if kept := p.behaviour.effect_retained:
                right.interval(kept.value, row, (kept.low, kept.high), colour)
        left.axes.axvline(100 * gates.kl_remaining, color=_RED, linewidth=0.9, linestyle="--")
        left.axes.set(xscale="log", xlim=(_LEAST_PERCENT / 2, 200))
        ticks = {_LEAST_PERCENT: "exact", 0.1: "0.1", 1: "1", 10: "10", 100: "100"}
        left.axes.set_xticks(list(ticks), list(ticks.values()))
        left.axes.minorticks_off()
        left.axes.set_xlabel("missing (remaining KL), %")
        right.axes.axvline(1, color=_GREY, linewidth=0.8)
        right.axes.axvline(gates.effect_retained, color=_RED, linewidth=0.9, linestyle="--")
        right.axes.set(xlabel="effect retained, 95 % interval")
        return [left.svg(), right.svg()]


def losses(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Markup]:
    """The loss of every step of each thing that was trained for long enough to have a curve."""
    charts = []
    for name, curve in curves.items():
        if len(curve["loss"]) < _CURVE:
            continue
        with _style():
            chart = _Chart()
            chart.axes.plot(curve["loss"], linewidth=0.8, color=_BLUE)
            chart.axes.set(title=_label(name), xlabel="step", ylabel="loss")
            charts.append(chart.svg())
    return charts


def _label(name: str) -> str:
    return shorten(plain(name), 40, placeholder="...")  # what is drawn must fit, and needs a glyph a character
