"""What the page of a run shows, and what it leaves out because it would mislead."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest
from typer.main import get_group

from compile_steer.cli.app import app
from compile_steer.report.charts import losses, wilson
from compile_steer.report.page import _compared, write_page
from compile_steer.report.recommendation import recommend
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun


def page(run: SmallRun, path: Path, parities: Sequence[Parity], folders: Sequence[Path]) -> str:
    report = ValidationReport.load(run.paths.validation)
    write_page(path, run.read(), "add", [], report, parities, recommend(parities, folders), {}, n_validation=8)
    return path.read_text(encoding="utf-8")


def test_the_same_run_writes_the_same_page_whatever_is_recommended(run: SmallRun, tmp_path: Path) -> None:
    folder = run.paths.merged("bias", "fp32")
    parity = Parity.load(folder / "parity.json")
    first, again = (page(run, tmp_path / name, [parity], [folder]) for name in ("a.html", "b.html"))
    assert first == again and first.count('class="prompt"') == 8
    assert f"from_pretrained(&#39;{folder}&#39;" in first and "vllm serve" in first
    (lines,) = re.findall("<pre>(compile-steer chat [^<]*)</pre>", first)
    for line in html.unescape(lines).splitlines():
        _program, command, *words = shlex.split(line)
        commands = get_group(app).commands
        assert commands[command].make_context(command, [*words]) and words == [str(tmp_path)]
    # Nothing to ship, and a report of an earlier version, which has no answers.
    failed = replace(parity, passed=False, reasons=["KL 1"], behaviour=replace(parity.behaviour, answers=[]))
    none = page(run, tmp_path / "c.html", [failed], [folder])
    assert "from_pretrained" not in none and "hold no answers" in none and 'class="prompt"' not in none
    for text in (first, none):  # every link leads somewhere
        assert set(re.findall(r'href="#(\w+)"', text)) <= set(re.findall(r'id="(\w+)"', text))


def test_what_differs_is_apart_from_its_first_word() -> None:
    shown = _compared({"prompt": "p", "base": "I am  a\nmodel.", "steered": "I am  a sea.", "compiled": "I am"})
    assert shown["steered"] == ("I am  a", " sea.") and shown["compiled"] == ("I am", "")
    assert _compared(dict.fromkeys(("prompt", "base", "steered", "compiled"), " x \n"))["steered"] == (" x \n", "")


@pytest.mark.parametrize(("hits", "n"), [(0, 4), (4, 4), (10, 24)])
def test_the_interval_of_a_score_shows_how_few_prompts_there_were(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_two_losses_are_no_curve() -> None:
    assert losses({"short": {"loss": [2.0, 1.0]}}) == []
    (chart,) = losses({"short": {"loss": [2.0, 1.0]}, "long": {"loss": [1 / n for n in range(1, 20)]}})
    assert "long" in chart and "<?xml" not in chart
