"""What values look like when they are printed, and in a notebook."""

from __future__ import annotations

import torch

from compile_steer.artifacts.provenance import PARITY
from compile_steer.steering.directions import Directions
from compile_steer.steering.low_rank import LowRank
from compile_steer.steering.patch import WeightPatch
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun
from tests.helpers.tiny import intervention, program


def test_reports_begin_with_their_verdict_and_show_their_figures_as_a_table(run: SmallRun) -> None:
    parity = Parity.load(run.paths.merged("bias", "fp32") / PARITY)
    name, first, *_rest = repr(parity).splitlines()
    assert name == "Parity" and first.split() == ["verdict", *parity.verdict.split()]
    assert f"{parity.divergence.n_tokens} held-out tokens" in repr(parity)
    report = ValidationReport.load(run.paths.validation)
    assert repr(report).splitlines()[1].split() == ["verdict", *f"{report.verdict}: {report.headline}".split()]
    assert all(reason in repr(report) for reason in report.reasons)
    table = report._repr_html_()
    assert table.startswith("<table>") and f">{report.verdict}: score " in table


def test_a_table_shows_markup_of_the_data_as_text(run: SmallRun) -> None:
    report = ValidationReport.load(run.paths.validation)
    report.reasons.append("<script>alert(1)</script>")
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def test_programs_directions_and_patches_say_what_they_hold(run: SmallRun) -> None:
    steering = program("llama", intervention("add", layer=2))
    assert repr(steering) == f"Program for 'tiny-llama': {steering.describe()}"
    directions = Directions.load(run.paths.directions)
    assert repr(directions).startswith("Directions(add at resid_post, 4 of 4 blocks, d_model 32, model ")
    patch = WeightPatch({"a": LowRank(torch.ones(5, 3), torch.ones(3, 7))}, {"b": torch.ones(5)})
    assert repr(patch) == "WeightPatch(1 low rank, 1 bias, rank 3)"
    assert repr(WeightPatch()) == "WeightPatch(no edit)"
