"""One self-contained HTML page for a run: no scripts, no assets from outside, charts inline as SVG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from compile_steer.artifacts.files import save_text
from compile_steer.artifacts.paths import real_path
from compile_steer.artifacts.provenance import Provenance
from compile_steer.common.errors import shell_word
from compile_steer.export.engine_support import engine_support
from compile_steer.report import charts
from compile_steer.report.glossary import glossary_terms
from compile_steer.report.render import render
from compile_steer.report.terminal import details
from compile_steer.validation.report import ValidationReport
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
    n_validation: int,
) -> None:
    """Write the page atomically.

    Args:
        curves: the losses of each thing that was trained.
        n_validation: the pairs of the validation split.
    """
    options, folder = recipe.validate_, recommendation.folder
    shown = next((p for p in parities if f"{p.backend} {p.form}" == recommendation.artifact), parities[0])
    run = shell_word(real_path(path).parent)
    page = render(
        "page.html",
        recipe=recipe,
        program=program,
        choices=choices,
        report=report,
        parities=parities,
        recommendation=recommendation,
        shown=shown,
        answers=[_compared(row) for row in shown.behaviour.answers],
        engines=[] if folder is None else engine_support(Provenance.read(folder), real_path(folder)),
        talk=f"compile-steer chat {run}\ncompile-steer play {run}",
        details=details,
        carries=charts.carries(report),
        control_pairs=min(options.control_pairs, report.n_pairs),
        costs=charts.costs(report, min(options.sweep_prompts, n_validation)),
        is_steered=charts.is_steered(parities, recipe.verify),
        losses=charts.losses(curves),
        glossary=glossary_terms(),
    )
    save_text(path, page)


def _compared(answers: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Each text in two parts: as it stands in the model before it, and from the first word that differs on."""
    base, steered = answers["base"], answers["steered"]
    return {
        "prompt": (answers["prompt"], ""),
        "base": (base, ""),
        "steered": _apart(steered, base),
        "compiled": _apart(answers["compiled"], steered),
    }


def _apart(text: str, other: str) -> tuple[str, str]:
    words = re.findall(r"\s*\S+|\s+$", text)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(words, re.findall(r"\s*\S+|\s+$", other), strict=False))
    start = sum(len(word) for word, _other in same)
    return text[:start], text[start:]
