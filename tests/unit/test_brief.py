"""What a command prints unless it is asked for every figure: it fits narrow terminals, and marks what counts."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from compile_steer.__main__ import main
from compile_steer.artifacts.paths import RunPaths
from compile_steer.cli.app import app
from compile_steer.common.detail import Detail
from compile_steer.common.progress import ProgressBars
from compile_steer.common.terminal import Terminal
from compile_steer.report import brief
from compile_steer.report.recommendation import recommend
from compile_steer.validation.report import ValidationReport
from compile_steer.verification.parity import Parity
from tests.helpers.small_run import SmallRun


def printed(show: Callable[..., None], *values: object, width: int = 60, colour: bool = False) -> str:
    stream = StringIO()
    show(Terminal(file=stream, width=width, force_terminal=colour), *values)
    return stream.getvalue()


@pytest.fixture
def report(run: SmallRun) -> ValidationReport:
    return ValidationReport.load(run.paths.validation)


@pytest.fixture
def parities(run: SmallRun) -> list[Parity]:
    folders = [run.paths.merged("bias", "fp32"), run.paths.adapter("closed_form")]
    return [Parity.load(folder / "parity.json") for folder in folders]


def test_a_run_fits_60_columns_and_names_chosen_point_verdict_and_each_failed_gate(
    run: SmallRun, report: ValidationReport, parities: list[Parity]
) -> None:
    options = run.read().validate_
    text = printed(brief.print_sweep, report) + printed(brief.print_verdict, report, options)
    assert text.count("<- chosen") == 1 and text.count(report.verdict.upper() + ":") == 1
    if report.verdict != "pass":
        assert text.index("│ Do: ") < text.index("│ - ")  # what to do stands before the reasons
    failed = printed(brief.print_artifacts, parities, width=400)
    assert failed.count("FAIL ") == sum(len(p.reasons) for p in parities)
    assert all(f"FAIL {p.backend} {p.form}: {reason}" in failed for p in parities for reason in p.reasons)
    text += printed(brief.print_artifacts, parities)
    text += printed(brief.print_answers, "What?", report, parities)
    assert max(map(len, text.splitlines())) <= 60


def test_the_next_commands_stay_on_one_line_so_that_they_can_be_copied(run: SmallRun, parities: list[Parity]) -> None:
    out = run.paths.out.rename(run.paths.out.with_name("a name"))
    paths, folders = RunPaths(out, "tide"), [out / "merged/tide-bias-fp32", out / "adapters/tide-closed_form"]
    shipped = recommend(parities, folders, verdict="pass")
    lines = printed(brief.print_end, shipped, paths, width=400).splitlines()
    assert any(line.startswith(f"SHIP {folders[0]}: ") for line in lines)
    narrow = printed(brief.print_end, shipped, paths, width=40)
    for name, end in {
        "talk to it": f"chat '{out}'",
        "serve it": "--out gguf/tide-bias-fp32",
        "make your own": "pirate'",
    }.items():
        (line,) = [line for line in narrow.splitlines() if name in line]
        assert line.endswith(end)
        words = shlex.split(line.removeprefix(f"  {name}"))
        command = words[words.index("compile_steer") + 1] if "compile_steer" in words else words[1]
        assert command in {registered.name for registered in app.registered_commands}


def test_colours_mark_failed_gates_where_the_console_has_them(
    parities: list[Parity], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    failed = [p for p in parities if p.reasons]
    assert "\x1b[31m" in printed(brief.print_artifacts, failed, colour=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed(brief.print_artifacts, failed, colour=True)


def code_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compile-steer", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_version_is_printed_and_verbose_with_quiet_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, "--version") == 0 and capsys.readouterr().out.startswith("compile-steer 0")
    assert code_of(monkeypatch, "glossary", "--verbose", "--quiet") == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize(("detail", "lines"), [(Detail.NORMAL, 0), (Detail.VERBOSE, 1)])
def test_a_log_gets_a_line_for_a_finished_phase_only_in_full_detail(detail: Detail, lines: int) -> None:
    stream = StringIO()
    bars = ProgressBars(Console(file=stream, width=80), detail)
    with bars.phase("reading", 2) as advance:
        advance(2)
    bars.remark("a figure that the report has too")
    assert stream.getvalue().count("reading") == lines == stream.getvalue().count("a figure")


def test_a_console_without_a_terminal_takes_its_width_from_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Terminal(file=StringIO()).width == 132
    monkeypatch.setenv("COLUMNS", "61")
    assert Terminal(file=StringIO()).width == 61


def test_quiet_prints_the_result_alone(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code_of(monkeypatch, "validate", str(run.recipe), "--out", str(run.paths.out), "--quiet")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and err == ""
    assert out.startswith(json.loads(run.paths.validation.read_text())["verdict"].upper())


@pytest.mark.parametrize(
    "name",
    [
        "adapters/tide-closed_form",
        "vectors/tide.safetensors",
        "vectors/tide.validation.json",
        "vectors/tide.directions.safetensors",
    ],
)
def test_show_says_what_an_artifact_is_in_five_lines_and_everything_with_verbose(
    run: SmallRun, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(monkeypatch, "show", str(run.paths.out / name)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("what ") and lines[-1].startswith("lineage") and len(lines) <= 5
    assert code_of(monkeypatch, "show", str(run.paths.out / name), "--verbose") == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_show_names_what_was_changed_and_exits_with_1(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = run.paths.adapter("closed_form")
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert code_of(monkeypatch, "show", str(adapter)) == 1
    assert "adapter_config.json" in capsys.readouterr().out
