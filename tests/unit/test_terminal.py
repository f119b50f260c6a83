"""Text from outside is text on the terminal: nothing in it acts, and nothing in it is markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from compile_steer.artifacts.provenance import EngineRecord
from compile_steer.cli import tables
from compile_steer.common.progress import ProgressBars
from compile_steer.common.terminal import Terminal
from compile_steer.lowering.plan import Choice
from compile_steer.report.terminal import print_plan
from compile_steer.tools.report_links import Link

PACKAGE = Path(__file__).parents[2] / "compile_steer"
EVIL = "[red]x[/] [/nope] [link=file:///etc/passwd]y[/link] :bomb: \x1b]52;c;ZXZpbA==\x07\x1b[2J\r\x08\x9b1A\u202etxt.exe\x00\ud800"
SHOWN = "[red]x[/] [/nope] [link=file:///etc/passwd]y[/link] :bomb:"


def _table() -> Table:
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    return table


def _bars(console: Terminal) -> None:
    bars = ProgressBars(console)
    with bars.phase(EVIL, 2) as advance:
        advance(1)
        bars.note(EVIL)


Print = Callable[[Terminal], object]


def _printed(value: RenderableType) -> Print:
    return lambda console: console.print(value)


@pytest.mark.parametrize(
    "show",
    [
        _printed(EVIL),
        _printed(Text.assemble("a ", (EVIL, "bold"))),
        _printed(_table()),
        lambda console: console.print(EVIL, style="bold blue"),
        _bars,
        lambda console: print_plan(console, EVIL, [Choice(EVIL, EVIL, False, None)]),
        lambda console: tables.print_lineage(console, [Link(EVIL, "changed", EVIL, EVIL, EVIL)]),
        lambda console: tables.print_engine_records(console, [EngineRecord(EVIL, EVIL, problem=EVIL)]),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_from_outside_acts_on_the_terminal(show: Print, terminal: bool) -> None:
    stream = StringIO()
    show(Terminal(file=stream, width=1000, force_terminal=terminal, color_system="truecolor" if terminal else None))
    written = stream.getvalue()
    # Of escape sequences only rich's own colours, and what moves a progress bar.
    own = re.sub(r"\x1b\[([\d;]*m|\?25[lh]|1?A|2K)|\r(?=\x1b\[2K|\n)|\r$", "", written)
    assert all(character.isprintable() or character == "\n" for character in own), repr(own)
    assert SHOWN in own
    own.encode()


def test_only_one_kind_of_console_and_the_boundary_write_to_the_streams() -> None:
    allowed = {
        "__main__.py": ("print(",),
        "cli/options.py": ("print(",),
        "export/engine_support.py": ("print(",),  # of a snippet for others
        "tools/chat.py": ("print(",),  # ends the line that Ctrl-D leaves open
        "artifacts/locks.py": ("print(", "sys.stderr"),  # one note, through `plain`
        "models/adapter_patterns.py": ("print(",),  # of a process whose output is a pipe
    }
    pattern = re.compile(
        r"(?<![\w.])print\(|(?<!\w)Console\(|echo\(|sys\.std(?:out|err)[\w.]*|rich\.markup|from_markup|markup=True"
    )
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        if "worker" in name or name == "common/terminal.py":  # a worker's output is a pipe to the process that reads it
            continue
        found = {match[0] for match in pattern.finditer(path.read_text(encoding="utf-8"))} - set(allowed.get(name, ()))
        assert name == "__main__.py" or not found, f"{name}: {found}"
