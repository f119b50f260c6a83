"""The pages of docs/ that benchmarks write, and findings that take hours, kept so that a stopped benchmark goes on."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import TypeAdapter
from rich.console import Console

from compile_steer.artifacts.files import save_text

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
Finding = TypeVar("Finding", bound=Any)  # a dataclass
Result = TypeVar("Result")


@dataclass(frozen=True)
class Record(Generic[Finding]):
    """A page in docs/.

    Attributes:
        page: its name, without .md.
        command: what writes it.
        setting: what was measured on, if it is the same for the whole page.
        kind: of the findings that lie as JSON lines beside the page; None for a page without.
    """

    page: str
    title: str
    command: str
    setting: str = ""
    kind: type[Finding] | None = None
    folder: Path = DOCS

    @property
    def path(self) -> Path:
        return self.folder / f"{self.page}.md"

    @property
    def lines(self) -> Path:
        return self.folder / f"{self.page.lower()}.jsonl"

    def save(self, *lines: str) -> str:
        """Write the page, `lines` below its head; returns its text."""
        head = f"Written by `{self.command}`; do not edit."
        if self.kind is not None:
            head += f" Every finding is in [{self.lines.name}]({self.lines.name})."
        setting = [f"{machine()} {self.setting}", ""] if self.setting else []
        text = "\n".join([f"# {self.title}", "", head, "", *setting, *lines]).rstrip() + "\n"
        save_text(self.path, text)
        return text

    def save_section(self, heading: str, lines: Sequence[str], introduction: Sequence[str] = ()) -> str:
        """Replace one section; they stand in the order of their headings unless the page has another.

        `introduction` stands above the sections; without it, what stands there.
        """
        parts = sections(self.path)
        parts[heading] = "\n".join(lines).strip()
        if not introduction:
            above = above_sections(self.path)
            above = above.partition("\n\n")[2] if self.setting else above  # the setting's paragraph is written anew
            introduction = [f"{above}\n"] if above else []
        self.save(*introduction, *formatted(parts))
        return parts[heading]

    def findings(self) -> list[Finding]:
        """What was found before."""
        lines = self.lines.read_text(encoding="utf-8").splitlines() if self.lines.is_file() else []
        assert self.kind is not None, "a page without findings"
        adapter = TypeAdapter(self.kind)
        return [adapter.validate_python(json.loads(line)) for line in lines]

    def resume(
        self,
        missing: Callable[[list[Finding]], Iterator[Finding]],
        report: Callable[[list[Finding]], Sequence[str]],
        describe: Callable[[Finding], str],
    ) -> None:
        """Find what is missing; JSON lines and page are saved after each finding."""
        console, found = Console(width=132), self.findings()
        for finding in missing(list(found)):
            found.append(finding)
            save_text(self.lines, "".join(json.dumps(asdict(one)) + "\n" for one in found))
            self.save(*report(found))
            console.print(describe(finding), markup=False)
        self.save(*report(found))


def sections(path: Path) -> dict[str, str]:
    """The sections of a Markdown file by heading; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def formatted(parts: Mapping[str, str]) -> Iterator[str]:
    """Sections as they stand on a page."""
    return (f"## {name}\n\n{text}\n" for name, text in parts.items())


def above_sections(path: Path) -> str:
    """What stands below a page's head and above its sections."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text.partition("\n## ")[0].partition("\nWritten by")[2].partition("\n")[2].strip()


def prose(heading: str, **values: object) -> str:
    """A section of benchmarks/prose.md with its gaps filled."""
    return sections(ROOT / "benchmarks" / "prose.md")[heading].format_map(values)


def table(header: str, rows: Iterable[str | Iterable[object]]) -> list[str]:
    """A Markdown table; `header`, and a row that is a text, are 'first | second | ...'."""
    columns = header.count("|") + 1
    return [f"| {header} |", "|" + "---|" * columns, *map(row, rows)]


def row(cells: str | Iterable[object]) -> str:
    """A line of a Markdown table."""
    return f"| {cells if isinstance(cells, str) else ' | '.join(map(str, cells))} |"


def timed(work: Callable[[], Result], clock: Callable[[], float] = time.perf_counter) -> tuple[Result, float]:
    """What `work` returns, and its seconds; by `time.process_time` those of the processor."""
    started = clock()
    return work(), clock() - started


def machine() -> str:
    """One sentence: date, processor, cores, torch, precision."""
    return f"{date.today().isoformat()}, {_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32, one seed."


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
